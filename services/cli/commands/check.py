"""`ringmesh check`: reports how a worker would serve each model of a repository.

A process of the worker's code loads the models. If a model ends that process, another one checks the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.cli.commands.sample_request import SampleRequest
from services.cli.errors import CommandError

_ROUTER = "127.0.0.1:8001"


@dataclass(frozen=True, slots=True)
class Report:
    """One description per model, as `services/inference/check.py` writes it, with `sample` requests."""

    repository: str
    models: list[dict[str, Any]]

    @property
    def failed(self) -> list[str]:
        return [model["name"] for model in self.models if model["error"]]


def check(repository: str) -> Report:
    """Loads each model of the repository. Raises CommandError if the repository cannot be read."""
    report = Report(repository, [])
    with tempfile.TemporaryDirectory(prefix="ringmesh-check-") as state:
        after: str | None = ""
        while after is not None:
            after = _run(repository, after, Path(state), report.models.append)
    for model in report.models:
        if not model["error"]:
            tensor = v2.ModelMetadataResponse.TensorMetadata
            inputs = [
                tensor(name=each["name"], datatype=each["datatype"], shape=each["shape"])
                for each in model["inputs"]
                if not each["optional"]
            ]
            outputs = [each["name"] for each in model["outputs"]]
            sample = SampleRequest(model["name"], inputs, outputs, model["sequence"])
            model["sample"] = {"grpcurl": sample.grpcurl(_ROUTER), "python": sample.python(_ROUTER)}
    return report


def _run(repository: str, after: str, state: Path, add: Callable[[dict[str, Any]], None]) -> str | None:
    """Adds the models whose names follow `after`. Returns the name of the model that ended the process, or None."""
    log = state / "log"
    checking = ""
    environment = {"RINGMESH_STATE_DIR": str(state)} | os.environ
    command = [sys.executable, "-P", "-m", "services.inference.check", repository, after]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,  # noqa: S603
    ):
        assert process.stdout is not None
        for line in process.stdout:
            described = json.loads(line)
            if "checking" in described:
                checking = described["checking"]
            else:
                add(described)
                checking = ""
    if process.returncode == 0:
        return None
    if checking:
        code = process.returncode
        end = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        add({"name": checking, "error": f"it ended the process that loaded it, {end}"})
        return checking
    lines = log.read_text(errors="replace").split("\n")
    raise CommandError(next((line.removeprefix("check: ") for line in reversed(lines) if line), "the check failed"))


def show(console: Console, report: Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"repository": report.repository, "models": report.models}, indent=2))
        return
    for model in report.models:
        console.print(
            Text(f"{model['name']}: {'FAILED' if model['error'] else 'ok'}", "red" if model["error"] else "green")
        )
        for title, value in _lines(model):
            console.print(Text(f"  {title:<10}{value}"), soft_wrap=True)
        for title, command in model.get("sample", {}).items():
            console.print(Text(f"  sample request, {title}:\n{command}"), soft_wrap=True)
        console.print()
    served = len(report.models) - len(report.failed)
    failed = f"; failed: {', '.join(report.failed)}" if report.failed else ""
    console.print(Text(f"{served} of {len(report.models)} models can be served{failed}"), soft_wrap=True)


def _lines(model: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("reason", model["error"])] if model["error"] else []
    lines += [("warning", text.removeprefix(f"model {model['name']}: ")) for text in model.get("warnings", [])]
    if "versions" in model:
        lines.append(("versions", ", ".join(map(str, model["versions"]))))
    for title in ("inputs", "outputs"):
        for tensor in model.get(title, []):
            remark = " (optional)" if tensor["optional"] else ""
            lines.append((title, f"{tensor['name']} {tensor['datatype']} {tensor['shape']}{remark}"))
    for title, key in (("used", "fields_used"), ("no effect", "fields_ignored")):
        if model.get(key):
            lines.append(("config", f"{title}: {', '.join(model[key])}"))
    if "provider" in model:
        memory = model["memory_bytes"]
        lines += [
            ("provider", model["provider"]),
            ("batching", model["batching"]),
            ("caching", "cached" if model["cached"] else f"not cached: {model['not_cached_because']}"),
            ("memory", "that of its steps" if memory is None else f"{memory / (1 << 20):.1f} MiB"),
        ]
    return lines
