"""The Ray actor that hosts one replica's backend.

    controller ── start() ──> backend.start ... Started          idempotent: a restarted controller asks again
               ── watch() ──> returns the reason when the engine has died; breaks when this process has
               ── pulse() ──> phase and elapsed seconds while starting, load when ready
               ── stop(drain_s)

An engine that dies takes the actor with it, and an actor that dies takes its engine's processes with it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass

from headrace.backends.base import Backend, Started
from headrace.errors import FatalStartError, HeadraceError, ReplicaUnhealthy
from headrace.fleet import placement, warden
from headrace.fleet.specs import Device, ReplicaSpec
from headrace.fleet.status import ReplicaPulse

MARK = "HEADRACE_REPLICA"
"""Environment variable by which the warden knows this replica's processes."""

_CHECK_INTERVAL_S = 0.05
_FAREWELL_S = 1.0
"""How long a replica whose engine died waits for its reason to reach the controller, before it ends itself."""


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Why a replica did not start. A value, since an exception would cross Ray wrapped in its traceback."""

    reason: str
    is_fatal: bool


@dataclass(frozen=True, slots=True)
class ReplicaOrder:
    """All that a replica actor needs to know."""

    spec: ReplicaSpec
    internal_token: str
    report_interval_s: float
    cores: tuple[int, ...] = ()
    host: str | None = None  # address to listen on; None: the node's own


class ReplicaActor:
    """One replica. Async: every method runs on the actor's loop."""

    def __init__(self, order: ReplicaOrder) -> None:
        self._order = order
        self._backend: Backend | None = None
        self._starting: asyncio.Task[Started | StartFailure] | None = None
        self._outcome: Started | StartFailure | None = None
        self._began_s = self._phase_began_s = time.monotonic()
        self._phase = "placing"
        self._ended_s: float | None = None
        self._node = ""
        if order.spec.simulated is None:
            _post_warden()

    async def start(self) -> Started | StartFailure:
        """Start the backend, or join the start under way; the outcome is kept."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        return await asyncio.shield(self._starting)

    async def watch(self) -> str:
        """Return the reason once the engine has died, and end this process soon after."""
        while True:
            backend = self._backend
            if backend is None:
                return "it was stopped"
            try:
                await backend.check()
            except ReplicaUnhealthy as error:
                asyncio.get_running_loop().call_later(_FAREWELL_S, os._exit, 1)
                return error.message
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def pulse(self) -> ReplicaPulse:
        """How it is, without waiting for anything."""
        report = self._backend.load() if self._backend is not None else None
        now_s = time.monotonic()
        return ReplicaPulse(
            pid=os.getpid(),
            node=self._node,
            phase=self._phase,
            phase_s=now_s - self._phase_began_s,
            start_s=(self._ended_s or now_s) - self._began_s,
            running=None if report is None else report.running,
            waiting=None if report is None else report.waiting,
            kv_use=None if report is None else report.kv_use,
            backlog_tokens=None if report is None else report.backlog_tokens,
        )

    async def stop(self, drain_s: float) -> None:
        """Finish what runs for at most `drain_s` and release everything; the process stays."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.stop(drain_s)

    async def _start(self) -> Started | StartFailure:
        outcome: Started | StartFailure
        try:
            self._node = _node_address()
            self._backend = _make_backend(self._order, self._order.host or self._node)
            outcome = await self._backend.start(self._enter)
            self._enter("ready")
        except HeadraceError as error:
            outcome = StartFailure(error.message, isinstance(error, FatalStartError))
        except Exception as error:  # supervision boundary: whatever it is, the controller decides
            outcome = StartFailure(f"{type(error).__name__}: {error}".splitlines()[0][:300], is_fatal=False)
        self._ended_s = time.monotonic()
        self._outcome = outcome
        return outcome

    def _enter(self, phase: str) -> None:
        self._phase, self._phase_began_s = phase, time.monotonic()


def _node_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def _make_backend(order: ReplicaOrder, host: str) -> Backend:
    spec = order.spec
    if spec.simulated is not None:
        from headrace.backends.simulated import SimulatedBackend

        return SimulatedBackend(
            spec.simulated,
            spec.model,
            spec.id,
            host=host,
            internal_token=order.internal_token,
            report_interval_s=order.report_interval_s,
        )
    from headrace.backends.vllm import VllmBackend
    from headrace.backends.vllm_arguments import EngineSettings

    settings = EngineSettings(
        model=spec.model,
        path=spec.source,
        arguments=spec.engine,
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        executor=_executor(spec),
    )
    return VllmBackend(
        settings,
        spec.id,
        host,
        order.internal_token,
        report_interval_s=order.report_interval_s,
        cores=placement.split(order.cores, spec.num_workers) if spec.device is Device.CPU else (),
    )


def _executor(spec: ReplicaSpec) -> str | None:
    """Stages of a pipeline may sit on other nodes, which only Ray reaches; one node's workers need no Ray."""
    if spec.num_workers == 1:
        return None
    return "ray" if spec.device is Device.CUDA and spec.pipeline_parallel > 1 else "mp"


def _post_warden() -> None:
    """From here on every process that this one starts carries a mark, and somebody outlives us to end them."""
    unmarked = dict(os.environ)
    os.environ[MARK] = secrets.token_hex(16)
    subprocess.Popen(
        [sys.executable, "-I", "-S", warden.__file__, str(os.getpid()), f"{MARK}={os.environ[MARK]}"],
        env=unmarked,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # no signal to our process group reaches it
    )
