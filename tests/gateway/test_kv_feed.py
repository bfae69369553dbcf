"""The KV-event feed against a publisher on real sockets, into the real index."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from headrace.backends.kv_event_publisher import KvEventPublisher
from headrace.backends.kv_event_wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    encode_batch,
)
from headrace.gateway.kv_event_reader import KvEventReader
from headrace.gateway.kv_feed import KvFeed
from headrace_kernels.block_hash import hash_blocks, salt
from headrace_router.events import AllCleared, BlocksRemoved, BlocksStored
from headrace_router.prefix_index import PrefixIndex
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, Request, Role

SIZE = 4
NAME, BOOT = ReplicaId("m-0"), BootId("one")


def stored(number: int) -> BlockStored:
    """Block `number` of one long prompt."""
    first = number * SIZE
    parent = number - 1 if number else None
    return BlockStored([number], parent, list(range(first, first + SIZE)), SIZE, None, "GPU", None)


def replica(events: str, replay: str | None, boot: BootId = BOOT) -> Replica:
    endpoints = Endpoints("http://127.0.0.1:1", kv_events=events, kv_replay=replay)
    return Replica(NAME, boot, "m", Role.UNIFIED, endpoints, block_size=SIZE)


class Bench:
    """An index, a feed into it and a publisher to listen to."""

    def __init__(self) -> None:
        self.index = PrefixIndex(num_slots=4, max_blocks=1 << 16)
        self.feed = KvFeed(asyncio.get_running_loop(), self.index)
        self.publisher = KvEventPublisher("127.0.0.1")
        self.events, self.replay = self.publisher.start()

    def join(self, member: Replica | None = None) -> None:
        member = member or replica(self.events, self.replay)
        self.index.follow([(member, 0)])
        self.feed.follow(Membership(1, (member,)))

    def hit_tokens(self, num_blocks: int) -> int:
        tokens = array("I", range(num_blocks * SIZE + 1))
        hashes = {SIZE: hash_blocks(tokens, SIZE, salt("m"))}
        hits = self.index.look_up(Request("m", prompt_tokens=len(tokens), block_hashes=hashes), 0.0)
        return 0 if hits is None else int(hits.tokens[0])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.feed.tick()
                await asyncio.sleep(0.005)

    async def until_caught_up(self) -> None:
        await self.until(lambda: self.feed.num_catching_up == 0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.feed.stop()
    await bench.publisher.stop()


async def test_live_events_reach_the_index(bench: Bench) -> None:
    bench.join()
    await bench.until_caught_up()
    for number in range(10):
        bench.publisher.publish([stored(number)])
        await bench.until(lambda number=number: bench.hit_tokens(number + 1) == (number + 1) * SIZE)  # type: ignore[misc]
    bench.publisher.publish([BlockRemoved([9], "GPU")])
    await bench.until(lambda: bench.hit_tokens(10) == 9 * SIZE)
    bench.index.check_integrity()
    assert 0 <= bench.feed.counts.lag_s < 5


async def test_caches_filled_before_the_gateway_started_are_replayed(bench: Bench) -> None:
    for number in range(500):
        bench.publisher.publish([stored(number)])
    bench.join()
    await bench.until(lambda: bench.hit_tokens(500) == 500 * SIZE)
    assert bench.feed.counts.replayed == 500
    assert bench.feed.counts.given_up == 0
    bench.index.check_integrity()


async def test_lost_batches_are_fetched_again(bench: Bench) -> None:
    bench.join()
    await bench.until_caught_up()
    publish = bench.publisher._publish
    assert publish is not None
    bench.publisher._publish = None  # nothing is sent and nothing kept...
    bench.publisher.publish([stored(0)])
    bench.publisher._publish = publish
    for number in range(3):  # ...so keep these, as an engine would, without sending them
        payload = encode_batch(KVEventBatch(0.0, [stored(number)]))
        bench.publisher._buffer.append((number.to_bytes(8, "big"), payload))
    bench.publisher._next_sequence = 3
    await bench.until(lambda: _send_until_heard(bench))
    await bench.until(lambda: bench.hit_tokens(4) == 4 * SIZE)
    assert bench.feed.counts.gaps == 1
    bench.index.check_integrity()


def _send_until_heard(bench: Bench) -> bool:
    """A subscription takes a moment; the first message that arrives shows it."""
    if bench.feed.counts.messages == 0:
        number = bench.publisher._next_sequence
        bench.publisher.publish([stored(number)])
    return bench.feed.counts.messages > 0


async def test_what_the_engine_no_longer_keeps_is_given_up(bench: Bench) -> None:
    for number in range(20):
        bench.publisher.publish([stored(number)])
    for _ in range(15):
        bench.publisher._buffer.popleft()
    bench.publisher.publish([AllBlocksCleared(), stored(0), stored(1)])
    bench.join()
    await bench.until(lambda: bench.hit_tokens(2) == 2 * SIZE)
    assert bench.feed.counts.given_up == 1
    bench.index.check_integrity()


async def test_replay_that_nobody_answers_is_given_up_in_the_end(bench: Bench) -> None:
    silent = KvEventPublisher("127.0.0.1")
    _, nobody = silent.start()
    await silent.stop()
    clock = _FastForward(bench)
    bench.join(replica(bench.events, nobody))
    await bench.until(lambda: (clock.skip(), bench.feed.num_catching_up == 0)[1])
    bench.publisher.publish([stored(0)])
    await bench.until(lambda: _resend(bench) or bench.feed.counts.messages > 0)
    await bench.until(lambda: (clock.skip(), bench.feed.num_catching_up == 0)[1])
    assert bench.feed.counts.messages > 0


async def test_a_replay_may_end_before_the_loop_has_looked_at_its_socket(bench: Bench) -> None:
    """libuv aborts the process when it is to watch a descriptor that is closed."""
    bench.join()
    (stream,) = bench.feed._streams.values()
    assert stream.replay is not None
    descriptor = stream.replay.fileno()
    stream.close()
    _wait_until_closed(descriptor)
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)  # through the selector
    assert bench.feed._readers == {}


def _wait_until_closed(descriptor: int) -> None:
    """ZMQ closes it in a thread of its own, and the loop must not run meanwhile."""
    with contextlib.suppress(OSError):
        while os.fstat(descriptor):
            time.sleep(0.001)


def _resend(bench: Bench) -> bool:
    bench.publisher.publish([stored(bench.publisher._next_sequence)])
    return False


class _FastForward:
    """Lets replays expire without waiting for them: their deadlines are brought to now."""

    def __init__(self, bench: Bench) -> None:
        self._feed = bench.feed

    def skip(self) -> None:
        for stream in self._feed._streams.values():
            stream.tick(float("inf"))


async def test_restarted_engine_starts_from_nothing(bench: Bench) -> None:
    for number in range(10):
        bench.publisher.publish([stored(number)])
    bench.join()
    await bench.until(lambda: bench.hit_tokens(10) == 10 * SIZE)
    successor = KvEventPublisher("127.0.0.1")
    events, replay = successor.start()
    try:
        successor.publish([stored(0)])
        bench.join(replica(events, replay, BootId("two")))
        assert bench.hit_tokens(10) == 0
        await bench.until(lambda: bench.hit_tokens(10) == SIZE)
        assert bench.feed.num_streams == 1
    finally:
        await successor.stop()


async def test_replica_that_left_is_not_listened_to(bench: Bench) -> None:
    bench.join()
    bench.feed.follow(Membership(2, ()))
    assert bench.feed.num_streams == 0


async def test_unreadable_batch_holds_up_nothing(bench: Bench) -> None:
    bench.publisher.publish([stored(0)])
    bench.publisher._buffer.append(((1).to_bytes(8, "big"), b"\xc1nonsense"))
    bench.publisher._next_sequence = 2
    bench.publisher.publish([stored(1)])
    bench.join()
    await bench.until(lambda: bench.hit_tokens(2) == 2 * SIZE)
    assert bench.feed.counts.unreadable == 1


async def test_others_get_their_turn_while_events_are_read(bench: Bench) -> None:
    bench.feed.stop()
    bench.feed = KvFeed(asyncio.get_running_loop(), bench.index, drain_s=0.0)
    for number in range(500):
        bench.publisher.publish([stored(number)])
    bench.join()
    await bench.until(lambda: bench.hit_tokens(500) == 500 * SIZE)
    assert bench.feed.counts.drains >= 500, "a turn that is over at once takes one message"


class LossyOnce(deque[tuple[bytes, bytes]]):
    """A buffer of batches whose first reader misses ten of them, as if the socket had been full for a moment."""

    has_lost = False

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        for number, entry in enumerate(super().__iter__()):
            if self.has_lost or not 10 <= number < 20:
                yield entry
        self.has_lost = True


async def test_a_replay_that_the_engine_could_not_send_whole_is_asked_for_again(bench: Bench) -> None:
    for number in range(6000):
        bench.publisher.publish([stored(number)])
    bench.publisher._buffer = LossyOnce(bench.publisher._buffer)
    bench.join()
    await bench.until(lambda: bench.hit_tokens(6000) == 6000 * SIZE)
    assert bench.feed.counts.given_up == 0
    assert bench.feed.counts.replays >= 2
    bench.index.check_integrity()


# --- the reader


def read(*events: BlockStored | BlockRemoved | AllBlocksCleared) -> list[object]:
    payload = encode_batch(KVEventBatch(1.0, list(events)))
    return list(KvEventReader(NAME, BOOT).read(0, payload)[0].events)


def test_digests_are_cut_to_their_last_eight_bytes() -> None:
    digest = bytes(range(32))
    event = BlockStored([digest], digest, [1, 2, 3, 4], 4, None, None, None)
    (converted,) = read(event)
    assert isinstance(converted, BlocksStored)
    assert converted.hashes == [int.from_bytes(digest[-8:], "big")]
    assert converted.parent == converted.hashes[0]
    assert converted.medium == "GPU"


def test_salt_and_adapter_are_told_apart() -> None:
    event = stored(0)
    event.lora_name, event.extra_keys = "adapter", [("adapter", "salt")]
    (converted,) = read(event)
    assert isinstance(converted, BlocksStored)
    assert (converted.lora, converted.cache_salt) == ("adapter", "salt")


def test_blocks_with_images_are_left_out() -> None:
    event = stored(0)
    event.extra_keys = [(("image", 0),)]
    assert read(event, AllBlocksCleared()) == [AllCleared()]


def test_only_lasting_attention_is_followed() -> None:
    window, full = stored(0), stored(0)
    window.group_idx, window.kv_cache_spec_kind = 0, "sliding_window"
    full.group_idx, full.kv_cache_spec_kind = 1, "full_attention"
    events = read(window, full, BlockRemoved([0], "GPU", group_idx=0), BlockRemoved([0], "GPU", group_idx=1))
    assert [type(event) for event in events] == [BlocksStored, BlocksRemoved]


def test_blocks_elsewhere_are_left_out() -> None:
    event = stored(0)
    event.locality = "REMOTE"
    assert read(event) == []


async def test_messages_during_a_replay_come_after_it_and_in_order(bench: Bench) -> None:
    for number in range(3000):
        bench.publisher.publish([stored(number)])
    bench.join()
    for number in range(3000, 6000):
        bench.publisher.publish([stored(number)])
        if number % 100 == 0:
            bench.feed.tick()
            await asyncio.sleep(0)
    await bench.until(lambda: bench.hit_tokens(6000) == 6000 * SIZE)
    await bench.until_caught_up()
    assert bench.feed.counts.given_up == 0
    assert bench.index.counts.orphans == 0
