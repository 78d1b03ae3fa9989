"""Settings that may change while a server runs: TraceSetting and LogSettings, with Triton's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.errors import InvalidArgumentError
from services.runtime.rpc.rpc import Context, Handler, unary
from services.runtime.telemetry.tracing import Tracer

_TRACE_NAMES = ("trace_level", "trace_rate")
# From the most verbose on.
_LEVELS = {
    "log_verbose_level": logging.DEBUG,
    "log_info": logging.INFO,
    "log_warning": logging.WARNING,
    "log_error": logging.ERROR,
}


class LiveSettings:
    """Reads and changes this process's trace ratios and log level."""

    def __init__(self, tracer: Tracer, check_model: Callable[[str], object]) -> None:
        """`check_model` raises a RingmeshError unless the model is served."""
        self._tracer = tracer
        self._check_model = check_model

    def handlers(self) -> dict[str, Handler]:
        return {
            "TraceSetting": unary(v2.TraceSettingRequest, self.trace),
            "LogSettings": unary(v2.LogSettingsRequest, self.log),
        }

    async def trace(self, request: v2.TraceSettingRequest, _: Context) -> v2.TraceSettingResponse:
        """Handles TraceSetting.

        `trace_level` is OFF or TIMESTAMPS. `trace_rate` N traces one request in N if the caller does not decide.
        A model uses the server's settings until it gets its own; a setting without values removes its own.
        """
        model = request.model_name
        if model:
            self._check_model(model)
        _check_names(request.settings, _TRACE_NAMES)
        given = {name: list(setting.value) for name, setting in request.settings.items() if setting.value}
        if len(given) < len(request.settings):
            self._tracer.ratios.pop(model, None)
        ratio = self._tracer.ratios.get(model, self._tracer.ratio)
        if "trace_rate" in given:
            (rate, *more) = given["trace_rate"]
            # Limited to 9 digits: int() raises on thousands of them.
            if more or not re.fullmatch(r"[1-9][0-9]{0,8}", rate):
                raise InvalidArgumentError(
                    f"trace_rate is one number from 1 to 999999999, not {given['trace_rate']}", field="settings"
                )
            ratio = 1 / int(rate)
        if "trace_level" in given:
            if not set(given["trace_level"]) <= {"OFF", "TIMESTAMPS"}:
                raise InvalidArgumentError(
                    f"trace_level is OFF or TIMESTAMPS, not {given['trace_level']}", field="settings"
                )
            if "OFF" in given["trace_level"]:
                ratio = 0.0
        if given and model:
            self._tracer.ratios[model] = ratio
        elif given:
            self._tracer.ratio = ratio
        value = v2.TraceSettingResponse.SettingValue
        return v2.TraceSettingResponse(
            settings={
                "trace_level": value(value=["TIMESTAMPS" if ratio else "OFF"]),
                "trace_rate": value(value=[str(round(1 / ratio)) if ratio else "0"]),
                "trace_mode": value(value=["opentelemetry"]),
            }
        )

    async def log(self, request: v2.LogSettingsRequest, _: Context) -> v2.LogSettingsResponse:
        """Handles LogSettings.

        `log_info`, `log_warning` and `log_error` turn levels on or off; `log_verbose_level` above 0 means debug.
        """
        _check_names(request.settings, _LEVELS)
        root = logging.getLogger()
        is_on = {name: root.level <= level for name, level in _LEVELS.items()}
        for name, setting in request.settings.items():
            kind, wanted = "bool_param", "true or false"
            if name == "log_verbose_level":
                kind, wanted = "uint32_param", "a number"
            if setting.WhichOneof("parameter_choice") != kind:
                raise InvalidArgumentError(f"{name} is {wanted}", field="settings")
            is_on[name] = bool(getattr(setting, kind))
        if request.settings:
            root.setLevel(next((level for name, level in _LEVELS.items() if is_on[name]), logging.CRITICAL))
        value = v2.LogSettingsResponse.SettingValue
        settings = {name: value(bool_param=root.level <= level) for name, level in _LEVELS.items()}
        settings["log_verbose_level"] = value(uint32_param=int(root.level <= logging.DEBUG))
        return v2.LogSettingsResponse(settings=settings)


def _check_names(given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted({*given} - {*known}):
        raise InvalidArgumentError(f"no setting {', '.join(unknown)}; there are {', '.join(known)}", field="settings")
