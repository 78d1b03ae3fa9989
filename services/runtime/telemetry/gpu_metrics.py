"""Metrics of the host's GPUs, read by NVML; none without the package nvidia-ml-py and a driver."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from services.runtime.telemetry.metrics import Family, Sample, Source

log = logging.getLogger(__name__)

_GPU = ("gpu", "name")
USE = Family("ringmesh_gpu_use_ratio", "gauge", "share of recent time in which the GPU ran a kernel", _GPU)
MEMORY_USED = Family("ringmesh_gpu_memory_used_bytes", "gauge", "memory of the GPU in use", _GPU)
MEMORY_TOTAL = Family("ringmesh_gpu_memory_total_bytes", "gauge", "memory of the GPU", _GPU)
TEMPERATURE = Family("ringmesh_gpu_temperature_celsius", "gauge", "temperature of the GPU", _GPU)
POWER = Family("ringmesh_gpu_power_watts", "gauge", "power that the GPU draws", _GPU)


def gpu_metrics() -> Source:
    """For `Metrics.add_slow`. Values that a GPU does not report are left out."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # no package, driver or device; each raises a different error
        log.debug("no GPU metrics: %s", error)
        return tuple
    return partial(_samples, nvml)


def _samples(nvml: Any) -> Iterator[Sample]:
    for index in range(nvml.nvmlDeviceGetCount()):
        with suppress(nvml.NVMLError):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(device)
            labels = (str(index), name.decode() if isinstance(name, bytes) else name)
            yield from _device(nvml, device, labels)


def _device(nvml: Any, device: Any, labels: tuple[str, ...]) -> Iterator[Sample]:
    with suppress(nvml.NVMLError):
        yield Sample(USE, labels, nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)
    with suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        yield Sample(MEMORY_USED, labels, memory.used)
        yield Sample(MEMORY_TOTAL, labels, memory.total)
    with suppress(nvml.NVMLError):
        yield Sample(TEMPERATURE, labels, nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))
    with suppress(nvml.NVMLError):
        yield Sample(POWER, labels, nvml.nvmlDeviceGetPowerUsage(device) / 1000)
