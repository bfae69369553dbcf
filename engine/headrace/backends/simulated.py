"""A backend without a model: the simulated engine behind OpenAI's API, in this process.

HTTP ──> FrontDoor ──> SimulatedApi ──> SimulatedLoop ──> SimulatedEngine
                                          ├──> LoadPublisher      load reports
                                          └──> KvEventPublisher   cache events, as vLLM sends them
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time

from headrace.backends.asgi_server import AsgiServer
from headrace.backends.base import Progress, Started
from headrace.backends.front_door import FrontDoor
from headrace.backends.kv_event_publisher import KvEventPublisher
from headrace.backends.load_publisher import LoadPublisher
from headrace.backends.ports import PortRange
from headrace.backends.simulated_api import SimulatedApi
from headrace.backends.simulated_loop import SimulatedLoop
from headrace.backends.simulated_report import engine_report
from headrace.backends.simulated_sequence import Step
from headrace.backends.simulated_tokens import encode, write_answer
from headrace.config import SimulatedEngine as Settings
from headrace.errors import FatalStartError, ReplicaUnhealthy, SleepFailed, StartError
from headrace_router.types import BootId, Endpoints, LoadReport, ReplicaId, Transfer


class SimulatedBackend:
    """Implements `headrace.backends.base.Backend`. One start per object."""

    def __init__(
        self,
        config: Settings,
        model: str,
        replica_id: ReplicaId,
        *,
        host: str = "127.0.0.1",
        internal_token: str | None = None,
        report_interval_s: float = 0.1,
        kv_connector: str | None = None,
        ports: PortRange | None = None,
    ) -> None:
        """`host` is an address of this node that gateways reach; without a token everybody is answered. With a
        `kv_connector`, whichever, prompts are handed over as vLLM's NixlConnector does."""
        self._kv_connector = kv_connector
        self._transfers: list[Transfer] = []
        self._replica_id = replica_id
        self._boot_id = BootId("")
        self._config = config
        self._load = LoadPublisher(host, report_interval_s, ports)
        self._kv_events = KvEventPublisher(host, ports)
        self._loop = SimulatedLoop(
            config,
            self._report,
            self._kv_events.publish,
            self._transfers.append,
            host="" if kv_connector is None else host,
            port_range=ports,
        )
        self._api = SimulatedApi(self._loop, model)
        self._door = FrontDoor(
            self._api, internal_token, release_kv=None if kv_connector is None else self._loop.release
        )
        self._server = AsgiServer(self._door, host, ports)
        self._remembered: list[int] | None = None  # the probe's answer before it fell asleep; None: awake
        self._drained = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def start(self, progress: Progress) -> Started:
        """Bind free ports and answer. Raises StartError when `host` is no address of this node."""
        began_s = time.monotonic()
        self._boot_id = BootId(secrets.token_hex(8))
        progress("engine")
        await asyncio.sleep(self._config.start_s)
        if self._config.start_error:
            await self.stop()
            raise FatalStartError(self._config.start_error)
        try:
            load = self._load.start()
            kv_events, kv_replay = self._kv_events.start()
            await self._loop.open_channel()
        except StartError:
            await self.stop()
            raise
        self._loop.start()
        self._report(None)
        engine_s = time.monotonic() - began_s
        progress("http")
        try:
            url = await self._server.start()
        except StartError:
            await self.stop()
            raise
        return Started(
            endpoints=Endpoints(url, load=load, kv_events=kv_events, kv_replay=kv_replay),
            boot_id=self._boot_id,
            block_size=self._config.block_size,
            num_blocks=self._config.num_blocks,
            max_model_len=self._loop.engine.max_context,
            max_running=self._config.max_running,
            kv_connector=self._kv_connector,
            phases_s=(("engine", engine_s), ("http", time.monotonic() - began_s - engine_s)),
        )

    async def check(self) -> None:
        """Raises ReplicaUnhealthy when the engine's loop or the HTTP server has ended."""
        for name, is_alive in (("engine", self._loop.alive), ("HTTP server", self._server.alive)):
            if not is_alive:
                raise ReplicaUnhealthy(f"the {name} of {self._replica_id} is not running")

    def load(self) -> LoadReport | None:
        """The newest report."""
        return self._load.newest

    def resident_hashes(self) -> list[int]:
        """Of every block in its cache, as the engine knows them."""
        return self._loop.engine.cache.resident_hashes()

    def unfinished(self) -> int:
        """See `Backend.unfinished`."""
        return self._door.inside

    async def sleep(self) -> None:
        """See `Backend.sleep`. The cache is forgotten; there is no other memory to give back."""
        if self._remembered is not None:
            return
        if self.unfinished():
            raise SleepFailed(f"requests run on {self._replica_id}; drain it first")
        self._door.close()
        self._remembered = await self._probe(is_wrong=False)
        self._loop.clear_cache()

    async def wake(self) -> None:
        """See `Backend.wake`."""
        if self._remembered is None:
            return
        await asyncio.sleep(self._config.wake_s)
        found, expected = await self._probe(is_wrong=self._config.wakes_wrong), self._remembered
        if found != expected:
            raise SleepFailed(
                f"awake again, it continues a probe with token {found}, not with {expected} as before"
            )
        self._remembered = None
        self._door.open()

    async def _probe(self, *, is_wrong: bool) -> list[int]:
        """What it answers to a short prompt."""
        prompt = encode("probe")
        answer, _ = write_answer(prompt, 1, ignore_eos=True)
        probe = self._loop.submit(
            f"probe-{secrets.token_hex(4)}", prompt, [token + is_wrong for token in answer]
        )
        return await probe.next_tokens()

    async def stop(self, drain_s: float = 0.0) -> None:
        """See `Backend.stop`. A second call joins the first; without `drain_s` it ends the first one's drain."""
        if drain_s <= 0:
            self._drained.set()
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(drain_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, drain_s: float) -> None:
        self._door.close()
        quiet = asyncio.ensure_future(self._api.wait_quiet())
        quiet.add_done_callback(lambda _: self._drained.set())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(drain_s, 0.0)):
                await self._drained.wait()
        quiet.cancel()
        await self._loop.stop()
        await self._server.stop()
        await self._kv_events.stop()
        await self._load.stop()

    def _report(self, step: Step | None) -> None:
        iterations = (step.iteration,) if step else ()
        transfers = tuple(self._transfers)
        self._transfers.clear()
        self._load.publish(
            engine_report(
                self._loop.engine,
                self._loop.in_flight,
                self._replica_id,
                self._boot_id,
                iterations=iterations,
                transfers=transfers,
            )
        )
