"""The pure engine in real time: a task that steps, sleeps as long as the step takes, and hands out tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.backends import simulated_cache as cache
from headrace.backends.kv_event_wire import AllBlocksCleared, BlockRemoved, BlockStored
from headrace.backends.ports import PortRange
from headrace.backends.simulated_engine import SimulatedEngine
from headrace.backends.simulated_sequence import Step
from headrace.backends.simulated_tokens import hash_blocks
from headrace.backends.simulated_transfer import NotHeld, SideChannel, fetch
from headrace.config import SimulatedEngine as Settings
from headrace.errors import ShuttingDown
from headrace_router.types import Transfer

KvEvents = list[BlockStored | BlockRemoved | AllBlocksCleared]

CATCH_UP_S = 0.05
"""How far behind its own schedule the engine may run and still catch up; timers are late by about 1 ms each."""


class Generation:
    """One answer in the making. Read with `next_tokens` by one task."""

    def __init__(self, request_id: str, prompt: Sequence[int], answer: list[int], salt: str) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.answer = answer
        self.salt = salt
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.produced = 0
        self.source: Mapping[str, Any] | None = (
            None  # where its prompt's blocks are, if they are to be fetched
        )
        self.holds = False  # its blocks stay, to be fetched
        self.is_cut = False  # ended before its last token, by an abort or a stop
        self._read = 0
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether everything produced has been read and nothing will follow."""
        return self._read == self.produced == len(self.answer)

    async def next_tokens(self) -> list[int]:
        """Tokens produced since the last call, at least one; [] once nothing will follow."""
        while self._read == self.produced:
            if self.is_cut or self.produced == len(self.answer):
                return []
            self._news.clear()
            await self._news.wait()
        start, self._read = self._read, self.produced
        return self.answer[start : self._read]

    def emit(self) -> None:
        self.produced += 1
        self._news.set()

    def cut(self) -> None:
        self.is_cut = True
        self._news.set()


class SimulatedLoop:
    """Owns a `SimulatedEngine` and the generations in it. Belongs to one event loop."""

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[Step | None], None],
        on_kv_events: Callable[[KvEvents], None],
        on_transfer: Callable[[Transfer], None] = lambda _: None,
        *,
        host: str = "",
        port_range: PortRange | None = None,
    ) -> None:
        """`on_change` is called after each step, and with None after each arrival and abort. With a `host` blocks
        are handed over between engines (`open_channel` comes first), and `on_transfer` hears of those received."""
        self._channel = SideChannel(host, self._count_held, self._free, port_range) if host else None
        self._on_transfer = on_transfer
        self._held: dict[str, tuple[int, asyncio.TimerHandle]] = {}  # tokens, and the end of the lease
        self._fetching: set[asyncio.Task[None]] = set()
        self.engine = SimulatedEngine(settings)
        self.in_flight: Step | None = None  # the step whose time is passing
        self._on_change = on_change
        self._on_kv_events = on_kv_events
        self._generations: dict[str, Generation] = {}
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether the engine is stepping or ready to."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def open_channel(self) -> None:
        """Let other engines fetch. Raises OSError."""
        if self._channel is not None:
            await self._channel.start()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        answer: list[int],
        salt: str = "",
        *,
        transfer: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Queue a request whose answer is known already; `transfer` is its kv_transfer_params, as vLLM takes them.

        Raises ValueError when it can never run and ShuttingDown when the loop has ended.
        """
        if not self.alive:
            raise ShuttingDown("the engine is stopping")
        generation = Generation(request_id, prompt, answer, salt)
        hashes = hash_blocks([*prompt, *answer], self.engine.settings.block_size, salt)
        if transfer is not None and self._channel is not None:
            generation.holds = bool(transfer.get("do_remote_decode"))
            if transfer.get("do_remote_prefill") and transfer.get("remote_block_ids"):
                generation.source = transfer
                generation.cached_tokens = int(transfer.get("remote_prefill_cached_tokens") or 0)
        self.engine.add(
            request_id,
            len(prompt),
            len(answer),
            hashes,
            holds=generation.holds,
            is_external=generation.source is not None,
        )
        self._generations[request_id] = generation
        self._arrived.set()
        self._on_change(None)
        return generation

    def abort(self, generation: Generation) -> None:
        """Drop a request and free its blocks; nothing happens when it is over. Always safe."""
        if self._generations.pop(generation.request_id, None) is not None:
            self.engine.abort(generation.request_id)
            generation.cut()
            self._on_change(None)

    def held_params(self, generation: Generation) -> dict[str, Any] | None:
        """What the second half needs to fetch what is held for this one; None where nothing is."""
        channel = self._channel
        if channel is None or not generation.holds or generation.is_cut:
            return None
        num_blocks = -(-len(generation.prompt) // self.engine.settings.block_size)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(num_blocks))],
            "remote_engine_id": f"{channel.host}:{channel.port}",
            "remote_request_id": generation.request_id,
            "remote_host": channel.host,
            "remote_port": channel.port,
            "tp_size": 1,
            "remote_num_tokens": len(generation.prompt),
            "remote_prefill_cached_tokens": generation.cached_tokens,
        }

    async def release(self, request_ids: list[str]) -> None:
        """Free what is held for these requests. Always safe."""
        for request_id in request_ids:
            self._free(request_id)

    def _hold(self, generation: Generation) -> None:
        lease_s, request_id = self.engine.settings.kv_lease_s, generation.request_id
        lease = asyncio.get_running_loop().call_later(lease_s, self._free, request_id)
        self._held[request_id] = len(generation.prompt), lease

    def _count_held(self, request_id: str) -> int | None:
        held = self._held.get(request_id)
        return None if held is None else held[0]

    def _free(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is not None:
            held[1].cancel()
        if self.engine.release(request_id):
            self._arrived.set()
            self._on_change(None)

    async def _fetch(self, generation: Generation) -> None:
        request_id, source = generation.request_id, generation.source
        assert source is not None
        clock = asyncio.get_running_loop().time
        moved = len(generation.prompt) - self.engine.local_tokens(request_id)
        began_s = clock()
        try:
            await fetch(source, moved * self.engine.settings.transfer_token_s)
        except NotHeld:
            # vLLM's `kv_load_failure_policy: recompute`.
            self.engine.not_received(request_id)
        else:
            if self.engine.received(request_id):
                self._on_transfer(Transfer(moved, clock() - began_s))
        self._arrived.set()
        self._on_change(None)

    def clear_cache(self) -> bool:
        """Forget every resident block and announce it. False while requests run."""
        cleared = self.engine.clear_cache()
        self._on_kv_events(self._translate(self.engine.take_events()))
        return cleared

    async def stop(self) -> None:
        """End the loop and cut every generation. Safe twice and before `start`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._cut_all()
        for _, lease in self._held.values():
            lease.cancel()
        for task in list(self._fetching):
            task.cancel()
        await asyncio.gather(*self._fetching, return_exceptions=True)
        if self._channel is not None:
            await self._channel.stop()

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        end_s = clock()
        try:
            while True:
                step = self.engine.step()
                if step is None:
                    self._arrived.clear()
                    await self._arrived.wait()
                    end_s = clock()
                    continue
                # Translated now: an abort during the sleep would take the request's tokens away.
                kv_events = self._translate(step.events)
                end_s = max(end_s, clock() - CATCH_UP_S) + step.duration_s
                self.in_flight = step
                await asyncio.sleep(max(0.0, end_s - clock()))
                self.in_flight = None
                self._deliver(step)
                self._on_kv_events(kv_events)
                self._on_change(step)
        finally:
            self._cut_all()

    def _deliver(self, step: Step) -> None:
        for request_id, cached_tokens in step.admitted.items():
            if generation := self._generations.get(request_id):
                generation.cached_tokens = cached_tokens
        for request_id in step.emitted:
            if generation := self._generations.get(request_id):
                generation.emit()
        for request_id in step.receiving:
            if receiving := self._generations.get(request_id):
                task = asyncio.get_running_loop().create_task(self._fetch(receiving))
                self._fetching.add(task)
                task.add_done_callback(self._fetching.discard)
        for request_id in step.finished:
            finished = self._generations.pop(request_id, None)
            if finished is not None and finished.holds:
                self._hold(finished)

    def _cut_all(self) -> None:
        for generation in list(self._generations.values()):
            self.abort(generation)

    def _translate(self, events: Sequence[cache.CacheEvent]) -> KvEvents:
        return [self._to_wire(event) for event in events]

    def _to_wire(self, event: cache.CacheEvent) -> BlockStored | BlockRemoved | AllBlocksCleared:
        if isinstance(event, cache.Removed):
            return BlockRemoved(list(event.hashes), medium="GPU", group_idx=0)
        if isinstance(event, cache.Cleared):
            return AllBlocksCleared()
        generation = self._generations[event.request_id]
        block_size = self.engine.settings.block_size
        num_blocks = len(event.hashes)
        start, end = event.first_block * block_size, (event.first_block + num_blocks) * block_size
        num_prompt = len(generation.prompt)
        tokens = list(generation.prompt[start:end])
        tokens += generation.answer[max(0, start - num_prompt) : max(0, end - num_prompt)]
        # As vLLM: the salt stands with a request's first block only, None with every other.
        extra_keys: list[tuple[str, ...] | None] = [None] * num_blocks
        if event.first_block == 0 and generation.salt:
            extra_keys[0] = (generation.salt,)
        return BlockStored(
            list(event.hashes), event.parent, tokens, block_size, lora_id=None, medium="GPU", lora_name=None,
            extra_keys=extra_keys, group_idx=0, kv_cache_spec_kind="full_attention",
        )  # fmt: skip
