import sys
import types

from services.runtime.telemetry.gpu_metrics import gpu_metrics


class NVMLError(Exception):
    pass


def nvml(power=True):
    """As pynvml, of one GPU."""

    def power_usage(device):
        if not power:
            raise NVMLError("not supported")
        return 71_500

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: f"device {index}",
        nvmlDeviceGetName=lambda device: b"L4",
        nvmlDeviceGetUtilizationRates=lambda device: types.SimpleNamespace(gpu=37),
        nvmlDeviceGetMemoryInfo=lambda device: types.SimpleNamespace(used=3, total=24),
        nvmlDeviceGetTemperature=lambda device, sensor: 61,
        nvmlDeviceGetPowerUsage=power_usage,
    )


def values(metrics):
    return {sample.family.name.removeprefix("ringmesh_gpu_"): sample.value for sample in metrics()}


def test_a_gpu_is_read_by_its_number_and_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    metrics = gpu_metrics()
    assert {sample.labels for sample in metrics()} == {("0", "L4")}
    assert values(metrics) == {
        "use_ratio": 0.37,
        "memory_used_bytes": 3,
        "memory_total_bytes": 24,
        "temperature_celsius": 61,
        "power_watts": 71.5,
    }


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(power=False))
    found = values(gpu_metrics())
    assert "power_watts" not in found
    assert "use_ratio" in found


def test_without_the_package_there_is_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert values(gpu_metrics()) == {}


def test_without_a_driver_there_is_nothing(monkeypatch):
    broken = nvml()

    def no_driver():
        raise NVMLError("driver not loaded")

    broken.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert values(gpu_metrics()) == {}
