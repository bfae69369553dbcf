"""The Ray actor that hosts one replica's backend.

    controller ── start() ──> backend.start ... Started          idempotent: a restarted controller asks again
               ── watch() ──> returns the reason when the engine has died; breaks when this process has
               ── pulse() ──> phase and elapsed seconds while starting, load when ready
               ── drain(deadline) ──> returns when nothing is left to answer; requests still get in
               ── sleep(), wake() ──> "", or why it could not
               ── stop(drain_s)

An engine that dies takes the actor with it, and an actor that dies takes its engine's processes with it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from headrace.backends.base import Backend, Started
from headrace.backends.kv_connectors import handing_over
from headrace.errors import FatalStartError, HeadraceError, ReplicaUnhealthy
from headrace.fleet import placement, warden
from headrace.fleet.gpu_quota_spec import Spot
from headrace.fleet.specs import Device, ReplicaSpec
from headrace.fleet.status import ReplicaPulse
from headrace.fleet.utilisation import Meter, make_meter

MARK = "HEADRACE_REPLICA"
"""Environment variable by which the warden knows this replica's processes."""

READY_PHASE = "ready"
ASLEEP_PHASE = "asleep"
"""What a pulse says of a replica that serves, and of one that sleeps."""

_CHECK_INTERVAL_S = 0.05
_FAREWELL_S = 1.0
"""How long a replica whose engine died waits for its reason to reach the controller, before it ends itself."""

_DRAIN_POLL_S = 0.02
_QUIET_S = 0.25
"""Nothing to answer for so long, after every gateway knows: what was on its way has arrived."""
_HELD_S = 5.0
"""How long blocks held for another replica delay the end. They are fetched within milliseconds, or never."""


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
    placement: placement.Placement | None = None  # of a replica whose cores we choose
    host: str | None = None  # address to listen on; None: the node's own
    spots: tuple[Spot, ...] = ()  # its GPUs, where tenants share them


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
        self._drain_deadline_s: float | None = None
        self._worked_s = 0.0  # when it last had something to answer, as `drain` knows
        self._node = ""
        self._meter: Meter | None = None
        self._metering = asyncio.Lock()
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
        utilisation = None
        if self._meter is not None:
            async with (
                self._metering
            ):  # in a thread: it reads files of every process, and tokens pass through here
                utilisation = await asyncio.to_thread(self._meter.read)
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
            utilisation=utilisation,
        )

    async def order(self) -> ReplicaOrder:
        """What it was started with."""
        return self._order

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is left to answer, at most `timeout_s` from the first call on. Whether nothing is left.

        It goes on taking requests: what a gateway sent before it heard of the drain is answered like any other. So
        nothing is settled here, and whoever changes its mind calls `resume`.
        """
        now_s = time.monotonic()
        if self._drain_deadline_s is None:
            self._worked_s = now_s
        self._drain_deadline_s = min(self._drain_deadline_s or now_s + timeout_s, now_s + timeout_s)
        quiet_since_s: float | None = None
        while (now_s := time.monotonic()) < self._drain_deadline_s:
            backend = self._backend
            if backend is None:
                return True
            try:
                await backend.check()
            except ReplicaUnhealthy:
                return False
            if self._has_work(backend):
                quiet_since_s = None
            elif quiet_since_s is None:
                quiet_since_s = now_s
            elif now_s - quiet_since_s >= _QUIET_S:
                return True
            await asyncio.sleep(_DRAIN_POLL_S)
        return False

    async def resume(self) -> None:
        """It is not to go after all."""
        self._drain_deadline_s = None

    def _has_work(self, backend: Backend) -> bool:
        now_s = time.monotonic()
        if backend.unfinished():
            self._worked_s = now_s
            return True
        # Blocks held for a hand-over will be fetched in a moment, or their lease runs out.
        outcome, report = self._outcome, backend.load()
        holds = isinstance(outcome, Started) and outcome.kv_connector is not None and report is not None
        return holds and report is not None and report.kv_use > 0 and now_s - self._worked_s < _HELD_S

    async def sleep(self) -> str:
        """Sleep. Returns why it could not; it is then good for `stop` only. "" when it sleeps."""
        self._drain_deadline_s = None
        return await self._change(lambda backend: backend.sleep(), ASLEEP_PHASE)

    async def wake(self) -> str:
        """Serve again. Likewise."""
        self._enter("waking")
        return await self._change(lambda backend: backend.wake(), READY_PHASE)

    async def _change(self, change: Callable[[Backend], Awaitable[None]], phase: str) -> str:
        if self._backend is None:
            return "it was stopped"
        try:
            await change(self._backend)
        except HeadraceError as error:
            return error.message
        except Exception as error:  # supervision boundary: whatever it is, the controller decides
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self._enter(phase)
        return ""

    async def stop(self, drain_s: float) -> None:
        """Finish what runs for at most `drain_s` and release everything; the process stays."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.stop(drain_s)

    async def _start(self) -> Started | StartFailure:
        outcome: Started | StartFailure
        try:
            self._node = _node_address()
            spec = self._order.spec
            self._meter = make_meter(spec.num_gpus, spec.cpus)
            self._backend = _make_backend(self._order, self._order.host or self._node)
            outcome = await self._backend.start(self._enter)
            self._enter(READY_PHASE)
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
            kv_connector=handing_over(spec.kv_connector, spec.kv_options),
            ports=spec.ports,
        )
    from headrace.backends.vllm import VllmBackend
    from headrace.backends.vllm_arguments import EngineSettings

    cores = () if order.placement is None else order.placement.cores
    settings = EngineSettings(
        model=spec.model,
        path=spec.source,
        arguments=spec.engine,
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        executor=_executor(spec),
        kv_connector=spec.kv_connector,
        kv_options=spec.kv_options,
        host_cache_gib=spec.host_cache_gib,
        sleep_level=spec.sleep_level,
    )
    return VllmBackend(
        settings,
        spec.id,
        host,
        order.internal_token,
        report_interval_s=order.report_interval_s,
        cores=placement.split(cores, spec.num_workers) if spec.device is Device.CPU else (),
        port_range=spec.ports,
    )


def _executor(spec: ReplicaSpec) -> str | None:
    """Stages of a pipeline may sit on other nodes, which only Ray reaches; one node's workers need no Ray."""
    if spec.num_workers == 1:
        return None
    return "ray" if spec.device is Device.CUDA and spec.pipeline_parallel > 1 else "mp"


def _post_warden() -> None:
    """From here on every process that this one starts carries a mark, and somebody outlives us to end them."""
    mark = secrets.token_hex(16)
    warden.post(f"{MARK}={mark}")
    os.environ[MARK] = mark
    os.environ[warden.KEEPS_ENVIRONMENT] = "1"
