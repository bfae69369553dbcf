"""How busy a replica's devices are, 0 to 1. It only ever vetoes a scale-down, see `autoscaler`.

On GPUs NVML tells: SM activity where it offers that (Hopper and later, by its GPM metrics), else the share of time in
which any kernel ran, which a single decoding stream brings to 100%. On CPU it is the time that the replica's processes
got of its cores. vLLM's engine process polls its queue with `sched_yield` for up to a second after each message, so
that one request a second already shows a core as mostly busy; and more processes than cores share what there is.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Protocol

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SHORTEST_S = 0.2
_LOOK_AGAIN_S = 10.0
"""How often processes are looked for that are new."""


class Meter(Protocol):
    """Reads one replica's devices."""

    def read(self) -> float | None:
        """Over the time since the last call, at least 0.2 s; None where nobody can tell. Never raises."""
        ...


class CpuMeter:
    """Of this process and all that it has started."""

    def __init__(self, num_cores: float) -> None:
        self._num_cores = max(num_cores, 0.01)
        self._family: frozenset[int] = frozenset()
        self._looked_s = float("-inf")
        self._at_s = 0.0
        self._used_s: dict[int, float] = {}
        self._last: float | None = None

    def read(self) -> float | None:
        now_s = time.monotonic()
        passed_s = now_s - self._at_s
        if passed_s < _SHORTEST_S:
            return self._last
        if now_s - self._looked_s >= _LOOK_AGAIN_S:
            self._looked_s, self._family = now_s, family(os.getpid())
        used_s = {pid: seconds for pid in self._family if (seconds := _cpu_s(pid)) is not None}
        if self._at_s:
            # Only those seen both times: what one used before it was seen is not of this while.
            spent_s = sum(
                seconds - self._used_s[pid] for pid, seconds in used_s.items() if pid in self._used_s
            )
            self._last = min(1.0, max(0.0, spent_s / (passed_s * self._num_cores)))
        self._at_s, self._used_s = now_s, used_s
        return self._last


class GpuMeter:
    """Of the GPUs that this process may use. `nvml` is the module pynvml, initialised here."""

    def __init__(self, nvml: Any, visible: str) -> None:
        """`visible`: as CUDA_VISIBLE_DEVICES. Raises what NVML raises."""
        nvml.nvmlInit()
        self._nvml = nvml
        self._gpus = [_handle(nvml, name.strip()) for name in visible.split(",") if name.strip()]
        self._has_gpm = bool(self._gpus) and all(_has_gpm(nvml, gpu) for gpu in self._gpus)
        self._samples = [self._sample(gpu) for gpu in self._gpus] if self._has_gpm else []
        self._at_s = time.monotonic()
        self._last: float | None = None

    def read(self) -> float | None:
        now_s = time.monotonic()
        if now_s - self._at_s < _SHORTEST_S or not self._gpus:
            return self._last
        self._at_s = now_s
        try:
            shares = self._sm_activity() if self._has_gpm else self._kernel_time()
        except Exception:  # NVML's errors are its own; a reading that fails is a reading that is missing
            self._last = None
        else:
            self._last = min(1.0, max(0.0, sum(shares) / len(shares)))
        return self._last

    def _kernel_time(self) -> list[float]:
        return [self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100.0 for gpu in self._gpus]

    def _sm_activity(self) -> list[float]:
        nvml, shares = self._nvml, []
        for index, gpu in enumerate(self._gpus):
            before, after = self._samples[index], self._sample(gpu)
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics = 1
            asked.sample1, asked.sample2 = before, after
            asked.metrics[0].metricId = nvml.NVML_GPM_METRIC_SM_UTIL
            self._samples[index] = after
            try:
                nvml.nvmlGpmMetricsGet(asked)
            finally:
                nvml.nvmlGpmSampleFree(before)
            shares.append(asked.metrics[0].value / 100.0)
        return shares

    def _sample(self, gpu: Any) -> Any:
        sample = self._nvml.nvmlGpmSampleAlloc()
        self._nvml.nvmlGpmSampleGet(gpu, sample)
        return sample


def make_meter(num_gpus: int, num_cores: float) -> Meter | None:
    """The one for a replica with so many GPUs, or on so many cores; None where there is none."""
    if not num_gpus:
        return CpuMeter(num_cores) if num_cores > 0 else None
    with contextlib.suppress(Exception):  # no driver, no library, a library of another version
        from vllm.third_party import pynvml

        return GpuMeter(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return None


def _handle(nvml: Any, name: str) -> Any:
    return (
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    )


def _has_gpm(nvml: Any, gpu: Any) -> bool:
    try:
        return bool(nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice)
    except Exception:  # an older driver does not know the question
        return False


def family(pid: int) -> frozenset[int]:
    """A process and its descendants. Looks at every process of the machine: a few milliseconds."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while added := {child for child, parent in parents.items() if parent in found and child not in found}:
        found |= added
    return frozenset(found)


def _cpu_s(pid: int) -> float | None:
    """Seconds of CPU that a process has used; None when there is none."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else None  # utime and stime


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the name before them may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
