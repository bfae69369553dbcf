"""Free memory of the GPUs that this process may use, through NVML: it makes no CUDA context, which would take some."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def of_own_gpus() -> tuple[int, int] | None:
    """Free and all bytes, summed over them. None where there is no GPU, or no NVML to ask."""
    with contextlib.suppress(Exception):  # every way in which a machine without NVIDIA's driver can refuse
        from vllm.third_party import pynvml  # nvidia-ml-py, as vLLM brings it

        pynvml.nvmlInit()
        try:
            told = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in _handles(pynvml)]
        finally:
            pynvml.nvmlShutdown()
        if told:
            return sum(one.free for one in told), sum(one.total for one in told)
    return None


def _handles(nvml: Any) -> list[Any]:
    """CUDA_VISIBLE_DEVICES holds numbers, or UUIDs; Ray sets it to the actor's own. Unset means all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]
