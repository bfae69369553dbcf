"""Ray Serve on this machine for a benchmark: a cluster of its own, and whose CPU time is whose in it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.backends import embedded_model
from headrace.fleet import warden
from headrace_bench.cpu_time import PROC, parse_schedstat
from headrace_bench.real_replica import MODEL, arguments

KV_BYTES = 268_435_456  # as in configs/local.yaml
_LOGICAL_CPUS = 8
"""More than there are: Ray Serve LLM asks for cores that its ingress and controllers hardly use."""

_MARK = "HEADRACE_BENCH_SERVE"


@dataclass(frozen=True, slots=True)
class Ground:
    """A Ray cluster with Serve's proxy on `port`."""

    port: int
    mark: str

    def url(self, prefix: str) -> str:
        return f"http://127.0.0.1:{self.port}{prefix}"

    def processes(self) -> dict[int, str]:
        """Process id → title, of every process that the cluster has started."""
        found = {}
        for pid in warden.marked(self.mark):
            with contextlib.suppress(OSError):
                title = (
                    (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                found[pid] = title.strip()
        return found

    def cpu_s(self, parts: Sequence[str]) -> float:
        """Seconds on a core so far of the processes whose title holds one of `parts`."""
        return sum(
            cpu_s(pid) for pid, title in self.processes().items() if any(part in title for part in parts)
        )


def cpu_s(pid: int) -> float:
    """Seconds on a core so far of all living threads of one process, without its children."""
    total = 0
    for schedstat in (PROC / str(pid) / "task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += parse_schedstat(schedstat.read_text())
    return total / 1e9


@contextlib.contextmanager
def serve_ground() -> Iterator[Ground]:
    """Start Ray and Serve; end both."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    value = os.environ[_MARK] = secrets.token_hex(8)
    import ray
    from ray import serve

    mark = f"{_MARK}={value}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ray.init(
        address="local",
        num_cpus=_LOGICAL_CPUS,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        yield Ground(port, mark)
        serve.shutdown()
    finally:
        ray.shutdown()
        warden.end_all(mark, 5.0)


def model_folder() -> Path:
    """Of the embedded model, made now where it is not there yet."""
    return embedded_model.ensure(lambda phase: None)


def llm_config(
    name: str, core: int | None, deployment: Mapping[str, Any] | None = None, kv_bytes: int = KV_BYTES
) -> Any:
    """Ray Serve LLM's configuration of the same engine: the same model, arguments and, where given, core."""
    from ray.serve.llm import LLMConfig

    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if core is not None:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(model_folder())},
        engine_kwargs={**arguments(kv_bytes), "enable_prompt_tokens_details": True},
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": variables},
        deployment_config={"max_ongoing_requests": 256, **(deployment or {})},
        log_engine_metrics=False,
    )


def our_config(fleet: str, kv_bytes: int = KV_BYTES) -> dict[str, Any]:
    """One replica of the same engine as a fleet of ours."""
    return {
        "fleet": {"name": fleet},
        "models": [
            {
                "name": MODEL,
                "pools": [{"replicas": 1, "device": "cpu", "engine": arguments(kv_bytes)}],
            }
        ],
        "gateway": {"access_log": False},
    }
