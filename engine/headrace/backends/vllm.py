"""vLLM in this process: its AsyncLLM engine and its own OpenAI server, behind the fleet's front door.

    start   arguments -> engine (child processes) -> app -> listening socket
    serve   front door (token) -> vLLM's app -> engine; statistics -> load reports; KV events by vLLM itself
    stop    close the door, wait for what runs, end the server, end the engine

One per process: vLLM reads environment variables and keeps process-wide registries.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from headrace.backends import (
    device_memory,
    embedded_model,
    ports,
    vllm_arguments,
    vllm_sleep,
    vllm_start_phases,
)
from headrace.backends.base import Progress, Started
from headrace.backends.front_door import FrontDoor
from headrace.backends.kv_connectors import handing_over
from headrace.backends.load_meter import LoadMeter
from headrace.backends.load_publisher import LoadPublisher
from headrace.backends.ports import PortRange
from headrace.backends.vllm_arguments import EngineSettings
from headrace.backends.vllm_sleep import EngineSleep
from headrace.backends.vllm_start_phases import StartLog
from headrace.backends.vllm_start_reasons import start_reasons
from headrace.errors import ReplicaUnhealthy, SleepFailed, StartError
from headrace_router.types import BootId, Endpoints, LoadReport, ReplicaId

_KEEP_ALIVE_S = 300
"""Longer than any gateway keeps an idle connection, so that it is never the replica that closes first."""

_RELEASE_TRIES, _RELEASE_PAUSE_S = 10, 0.1

_WATCH_INTERVAL_S = 0.02
"""How often arrivals and aborts, which vLLM announces to nobody, are looked for. A look costs about 2 µs."""


class VllmBackend:
    """One vLLM engine with vLLM's HTTP API on `host`, a private address of this node."""

    def __init__(
        self,
        settings: EngineSettings,
        replica_id: ReplicaId,
        host: str,
        internal_token: str | None = None,
        *,
        report_interval_s: float = 0.1,
        cores: tuple[tuple[int, ...], ...] = (),
        port_range: PortRange | None = None,
    ) -> None:
        """`cores` binds each worker of a CPU engine to its cores; empty leaves the choice to vLLM. `port_range`: what
        others connect to. vLLM's KV events then listen on every interface: it has no other way to a given port."""
        self.boot_id = BootId(secrets.token_hex(8))
        self._settings = settings
        self._host = host
        self._token = internal_token
        self._cores = cores
        self._meter = LoadMeter(replica_id, self.boot_id, holds_blocks=settings.kv_connector is not None)
        self._ports = port_range
        self._kept: list[socket.socket] = []  # ports that vLLM binds later
        self._publisher = LoadPublisher(host, report_interval_s, port_range)
        self._engine: Any = None
        self._door: FrontDoor | None = None
        self._server: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._seen = (0, 0)
        self._sleep: EngineSleep | None = None
        self._is_asleep = False

    async def start(self, progress: Progress) -> Started:
        """Bring the engine up; about 35 s on two CPU cores. Raises StartError, FatalStartError."""
        phases = _Phases(progress)
        try:
            settings = await asyncio.to_thread(_with_local_path, self._settings, phases.enter)
            phases.enter("imports")
            settings = self._with_event_ports(settings)
            self._set_environment(settings)
            args = await asyncio.to_thread(vllm_arguments.parse, settings)
            phases.enter("engine")
            following = asyncio.create_task(vllm_start_phases.follow(StartLog(), phases.enter))
            try:
                with start_reasons(settings):
                    # In a thread: it blocks for as long as the engine loads, and the host wants to see progress.
                    self._engine = await asyncio.to_thread(_make_engine, args, self._logger_factory())
            finally:
                following.cancel()
            phases.enter("server")
            url = await self._serve(args)
        except BaseException:
            await self.stop()
            raise
        finally:
            for kept in self._kept:
                kept.close()
        if settings.sleep_level is not None:
            self._sleep = EngineSleep(
                self._engine,
                settings.sleep_level,
                device_memory.of_own_gpus,
                partial(vllm_sleep.greedy_token, self._engine),
            )
        config = self._engine.vllm_config
        self._meter.capacity_tokens = config.cache_config.block_size * (
            config.cache_config.num_gpu_blocks or 0
        )
        events = self._engine.get_kv_event_sources().get(0) if settings.has_kv_events else None
        endpoints = Endpoints(
            url=url,
            load=self._publisher.start(),
            kv_events=None if events is None else self._reached(events.endpoint),
            kv_replay=None if events is None else self._reached(events.replay_endpoint),
        )
        self._publish()
        self._watching = asyncio.create_task(self._watch_arrivals())
        return Started(
            endpoints=endpoints,
            boot_id=self.boot_id,
            block_size=config.cache_config.block_size,
            num_blocks=config.cache_config.num_gpu_blocks,
            max_model_len=config.model_config.max_model_len,
            max_running=_places(config.scheduler_config),
            kv_connector=handing_over(settings.kv_connector, settings.kv_options),
            phases_s=phases.finished(),
        )

    async def check(self) -> None:
        """Cheap: reads flags that vLLM's own monitors set when a process of the engine dies."""
        if self._engine is None:
            raise ReplicaUnhealthy("the engine has not started")
        if self._engine.errored:
            raise ReplicaUnhealthy("the engine process died")
        if self._serving is None or self._serving.done():
            raise ReplicaUnhealthy("the HTTP server ended")

    def load(self) -> LoadReport | None:
        """The newest report."""
        return self._publisher.newest

    def unfinished(self) -> int:
        """Those inside the door, or those of the engine: an answer in the background has no connection."""
        return max(self._door.inside if self._door is not None else 0, self._unfinished())

    async def sleep(self) -> None:
        """See `Backend.sleep`."""
        if self._is_asleep:
            return
        if self._sleep is None or self._door is None:
            raise SleepFailed("this engine was started without sleep mode; set pools[].autoscale.warm")
        if self.unfinished():
            raise SleepFailed("requests run; drain it first")
        self._door.close()
        await self._sleep.sleep()
        self._is_asleep = True

    async def wake(self) -> None:
        """See `Backend.wake`."""
        if self._is_asleep and self._sleep is not None and self._door is not None:
            await self._sleep.wake()
            self._is_asleep = False
            self._door.open()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Safe at any time and twice."""
        if self._door is not None:
            self._door.close()
            deadline = time.monotonic() + drain_s
            while self.unfinished() and time.monotonic() < deadline:  # noqa: ASYNC110 vLLM offers no event
                await asyncio.sleep(_WATCH_INTERVAL_S)
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
        serving, self._serving = self._serving, None
        if serving is not None:
            self._server.should_exit = True
            self._server.force_exit = self._unfinished() > 0
            await asyncio.wait([serving], timeout=2.0)
            serving.cancel()
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)
        await self._publisher.stop()

    def _set_environment(self, settings: EngineSettings) -> None:
        """What vLLM reads at import; its children inherit it. Process-wide, hence one backend per process."""
        os.environ["VLLM_HOST_IP"] = self._host
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_SERVER_DEV_MODE"] = "0"  # keeps sleep, collective_rpc and the like unregistered
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would take this process's sockets along
        if settings.kv_connector is not None:
            os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = self._host
            os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(self._keep_port())
        if self._cores:
            ranks = "|".join(",".join(map(str, cores)) for cores in self._cores)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ranks
        if Path(settings.path).is_dir():
            os.environ["HF_HUB_OFFLINE"] = "1"  # a local model never waits for a network that is not there

    def _with_event_ports(self, settings: EngineSettings) -> EngineSettings:
        if self._ports is None or not settings.has_kv_events:
            return settings
        return replace(settings, kv_event_ports=(self._keep_port(), self._keep_port()))

    def _keep_port(self) -> int:
        """A port that vLLM binds in a child process, minutes from now. A socket that is bound and does not listen keeps
        it ours till then; ZMQ may bind beside it, since both set SO_REUSEADDR."""
        self._kept.append(ports.bind(self._host, self._ports, shares=True))
        return int(self._kept[-1].getsockname()[1])

    def _reached(self, endpoint: str | None) -> str | None:
        """As others reach what listens on every interface."""
        where = f"[{self._host}]" if ":" in self._host else self._host
        return None if endpoint is None else endpoint.replace("tcp://*:", f"tcp://{where}:")

    def _logger_factory(self) -> Callable[[Any, int], Any]:
        from vllm.v1.metrics.loggers import StatLoggerBase

        record, publish = self._meter.record, self._publish

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                record(scheduler_stats, iteration_stats)
                publish()

            def log_engine_initialized(self) -> None:
                pass

        return lambda _config, _engine_index: Logger()

    async def _serve(self, args: Any) -> str:
        import uvicorn
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, args, tasks)
        self._door = FrontDoor(
            app,
            self._token,
            lambda: self._engine is None or self._engine.errored,
            release_kv=self._release_kv if self._settings.kv_connector is not None else None,
        )
        listening = ports.bind(self._host, self._ports)
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            self._door,
            access_log=False,
            log_level="warning",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._server = app.state.server = _server(config)  # vLLM ends it when its engine has died
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._serving.done():
                raise StartError("vLLM's HTTP server ended while starting; see the replica's log")
            await asyncio.sleep(0.01)
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}"

    async def _release_kv(self, request_ids: list[str]) -> None:
        """Free what is held for these requests. Tried for a moment: the worker hears of a lease one step after the
        answer that named it has left, and a request whose blocks were fetched has none."""
        for _ in range(_RELEASE_TRIES):
            engine = self._engine
            if engine is None or engine.errored:
                return
            ended = await engine.collective_rpc("headrace_release_kv", args=(request_ids,))
            if any(ended):
                return
            await asyncio.sleep(_RELEASE_PAUSE_S)

    def _unfinished(self) -> int:
        return 0 if self._engine is None else self._engine.output_processor.get_num_unfinished_requests()

    async def _watch_arrivals(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if self._frontend() != self._seen:
                self._publish()

    def _frontend(self) -> tuple[int, int]:
        """Unfinished requests, and prompt tokens of those without a first token."""
        if self._engine is None:
            return 0, 0
        processor = self._engine.output_processor
        return processor.get_num_unfinished_requests(), processor.get_num_queued_tokens()

    def _publish(self) -> None:
        self._seen = self._frontend()
        self._publisher.publish(self._meter.report(*self._seen))


class _Phases:
    """Names and times the steps of a start."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._entered: list[tuple[str, float]] = []

    def enter(self, phase: str) -> None:
        self._entered.append((phase, time.monotonic()))
        self._progress(phase)

    def finished(self) -> tuple[tuple[str, float], ...]:
        ends = [at for _, at in self._entered[1:]] + [time.monotonic()]
        return tuple((name, end - at) for (name, at), end in zip(self._entered, ends, strict=True))


def _with_local_path(settings: EngineSettings, progress: Progress) -> EngineSettings:
    if settings.path != embedded_model.SOURCE:
        return settings
    return replace(settings, path=str(embedded_model.ensure(progress)))


def _make_engine(args: Any, logger_factory: Callable[[Any, int], Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs.from_cli_args(args),
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[logger_factory],
    )


def _places(scheduler_config: Any) -> int:
    """Requests that vLLM's scheduler lets run at one time (`Scheduler.max_num_active_reqs`)."""
    return int(scheduler_config.max_num_active_seqs or scheduler_config.max_num_seqs)


def _server(config: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to the host."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)
