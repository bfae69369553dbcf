"""How busy a replica's devices are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from headrace.fleet.utilisation import CpuMeter, GpuMeter, family, make_meter


def test_a_busy_child_is_seen_and_its_silence_too() -> None:
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        meter = CpuMeter(num_cores=1)
        assert meter.read() is None, "nothing to compare with yet"
        used = time.process_time()
        until_s = time.monotonic() + 30
        while not (busy := meter.read()) and time.monotonic() < until_s:
            time.sleep(0.05)
        assert busy is not None
        assert 0 < busy <= 1
        assert spinning.pid in family(os.getpid())
        assert time.process_time() - used < 15
    finally:
        spinning.kill()
        spinning.wait()


def test_a_replica_on_no_core_and_one_without_a_driver_tell_nothing() -> None:
    assert make_meter(0, 0.0) is None
    assert make_meter(1, 1.0) is None or os.path.exists("/dev/nvidiactl")


class Nvml:
    """As pynvml: one GPU, with or without GPM."""

    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_GPM_METRIC_SM_UTIL = 2

    def __init__(self, *, has_gpm: bool) -> None:
        self._has_gpm = has_gpm
        self.samples = 0
        self.is_broken = False

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlGpmQueryDeviceSupport(self, gpu: str) -> Any:
        return SimpleNamespace(isSupportedDevice=int(self._has_gpm))

    def nvmlGpmSampleAlloc(self) -> object:
        self.samples += 1
        return object()

    def nvmlGpmSampleGet(self, gpu: str, sample: object) -> None: ...

    def nvmlGpmSampleFree(self, sample: object) -> None:
        self.samples -= 1

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        return SimpleNamespace(metrics=[SimpleNamespace(metricId=0, value=0.0)])

    def nvmlGpmMetricsGet(self, asked: Any) -> None:
        if self.is_broken:
            raise RuntimeError("lost")
        assert asked.metrics[0].metricId == self.NVML_GPM_METRIC_SM_UTIL
        asked.metrics[0].value = 25.0

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        return SimpleNamespace(gpu=100)


def due(meter: GpuMeter) -> float | None:
    meter._at_s -= 1.0
    return meter.read()


def test_sm_activity_is_preferred_to_the_time_in_which_any_kernel_ran() -> None:
    assert due(GpuMeter(Nvml(has_gpm=True), "0,GPU-abc")) == 0.25
    assert due(GpuMeter(Nvml(has_gpm=False), "0")) == 1.0


def test_samples_are_given_back() -> None:
    nvml = Nvml(has_gpm=True)
    meter = GpuMeter(nvml, "0,1")
    for _ in range(5):
        due(meter)
    assert nvml.samples == 2


def test_a_reading_that_fails_is_a_reading_that_is_missing() -> None:
    nvml = Nvml(has_gpm=True)
    meter = GpuMeter(nvml, "0")
    assert due(meter) == 0.25
    nvml.is_broken = True
    assert due(meter) is None
