"""The index converges on what the engines hold, whatever becomes of their messages on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace_kernels.block_hash import hash_blocks, salt
from headrace_router.events import (
    CPU,
    GPU,
    AllCleared,
    BlocksKnown,
    BlocksRemoved,
    BlocksStored,
    CacheEvent,
    EventBatch,
)
from headrace_router.prefix_index import PrefixIndex
from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Request, Role

SIZE = 4
BOOT = BootId("1")


def replica(name: str, boot: str = "1", block_size: int = SIZE) -> Replica:
    return Replica(
        ReplicaId(name),
        BootId(boot),
        "m",
        Role.UNIFIED,
        Endpoints("http://127.0.0.1:1"),
        block_size=block_size,
    )


def index_of(*names: str) -> PrefixIndex:
    index = PrefixIndex(num_slots=8, max_blocks=10_000)
    index.follow([(replica(name), slot) for slot, name in enumerate(names)])
    return index


def stored(
    tokens: list[int], first: int = 0, name: int = 0, parent: int | None = None, medium: str = GPU
) -> BlocksStored:
    """Blocks of `tokens` from block `first` on; the engine calls block i of a prompt `1000 * name + i`."""
    count = len(tokens) // SIZE - first
    hashes = [1000 * name + first + i for i in range(count)]
    if parent is None and first:
        parent = 1000 * name + first - 1
    return BlocksStored(hashes, parent, tokens[first * SIZE :], SIZE, medium)


def batch(name: str, sequence: int, *events: CacheEvent, boot: str = "1") -> EventBatch:
    return EventBatch(ReplicaId(name), BootId(boot), sequence, events)


def request(tokens: list[int], lora: str | None = None, cache_salt: str | None = None) -> Request:
    parent = salt("m", lora=lora, cache_salt=cache_salt)
    hashes = {SIZE: hash_blocks(tokens, SIZE, parent)}
    return Request("m", prompt_tokens=len(tokens) + 1, block_hashes=hashes)


def hits(index: PrefixIndex, tokens: list[int], now_s: float = 0.0) -> list[int]:
    found = index.look_up(request(tokens), now_s)
    assert found is not None
    return found.tokens[:3].tolist()


TOKENS = list(range(16))


def test_announced_blocks_are_found_by_their_tokens() -> None:
    index = index_of("a", "b")
    assert index.apply(batch("b", 0, stored(TOKENS[:8]))) is None
    assert index.apply(batch("b", 1, stored(TOKENS, 2))) is None
    assert hits(index, TOKENS) == [0, 16, 0]
    assert hits(index, [*TOKENS[:8], 99, 99, 99, 99]) == [0, 8, 0]
    index.check_integrity()


def test_last_token_of_a_prompt_is_never_a_hit() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS)))
    asked = request(TOKENS)._replace(prompt_tokens=16)
    found = index.look_up(asked, 0.0)
    assert found is not None
    assert found.tokens[0] == 12


def test_lora_and_cache_salt_set_prompts_apart() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS)._replace(lora="x", cache_salt="s")))
    assert hits(index, TOKENS) == [0, 0, 0]
    found = index.look_up(request(TOKENS, "x", "s"), 0.0)
    assert found is not None
    assert found.tokens[0] == 16


def test_block_stays_until_its_last_copy_goes() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS), stored(TOKENS)))
    index.apply(batch("a", 1, BlocksRemoved([3]), BlocksRemoved([2])))
    assert hits(index, TOKENS) == [16, 0, 0]
    index.apply(batch("a", 2, BlocksRemoved([3])))
    assert hits(index, TOKENS) == [12, 0, 0]
    index.check_integrity()


def test_gap_is_named_and_filled_by_the_replay() -> None:
    index = index_of("a")
    assert index.apply(batch("a", 0, stored(TOKENS[:4]))) is None
    assert index.apply(batch("a", 3, BlocksRemoved([3]))) == 1
    assert index.gap(ReplicaId("a")) == (1, 3)
    assert index.apply(batch("a", 2, stored(TOKENS, 3))) == 1
    assert index.apply(batch("a", 1, stored(TOKENS[:12], 1))) is None
    assert hits(index, TOKENS) == [12, 0, 0]
    assert index.apply(batch("a", 1, stored(TOKENS[:12], 1))) is None
    assert index.counts.duplicates == 1
    index.check_integrity()


def test_gap_that_cannot_be_filled_costs_what_was_known_but_nothing_after() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS)))
    other = list(range(50, 62))
    index.apply(batch("a", 5, stored(other, name=1)))
    index.give_up_gap(ReplicaId("a"), BOOT)
    assert hits(index, TOKENS) == [0, 0, 0]
    assert hits(index, other) == [12, 0, 0]
    assert index.apply(batch("a", 6, BlocksRemoved([1002]))) is None
    assert hits(index, other) == [8, 0, 0]
    index.check_integrity()


def test_flood_behind_a_gap_is_bounded() -> None:
    index = index_of("a")
    for number in range(1, 5000):
        index.apply(batch("a", number))
    assert index.counts.gaps_given_up == 1
    assert index.gap(ReplicaId("a")) is None


def test_restarted_replica_holds_nothing_and_its_predecessor_is_not_heard() -> None:
    index = index_of("a", "b")
    index.apply(batch("a", 0, stored(TOKENS)))
    index.follow([(replica("a", "2"), 0), (replica("b"), 1)])
    assert hits(index, TOKENS) == [0, 0, 0]
    index.apply(batch("a", 1, stored(TOKENS), boot="1"))
    assert hits(index, TOKENS) == [0, 0, 0]
    index.apply(batch("a", 0, stored(TOKENS), boot="2"))
    assert hits(index, TOKENS) == [16, 0, 0]
    index.check_integrity()


def test_replicas_may_differ_in_block_size() -> None:
    index = PrefixIndex(num_slots=8)
    index.follow([(replica("a", block_size=4), 0), (replica("b", block_size=8), 1)])
    assert index.block_sizes("m") == (4, 8)
    index.apply(batch("a", 0, stored(TOKENS[:12])))
    index.apply(batch("b", 0, BlocksStored([1], None, TOKENS[:8], 8)))
    hashes = {size: hash_blocks(TOKENS, size, salt("m")) for size in (4, 8)}
    found = index.look_up(Request("m", prompt_tokens=17, block_hashes=hashes), 0.0)
    assert found is not None
    assert found.tokens[:2].tolist() == [12, 8]
    index.check_integrity()


def test_blocks_of_the_cpu_tier_carry_a_prefix_on_and_are_named_slow() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS[:8]), stored(TOKENS, medium=CPU)))
    found = index.look_up(request(TOKENS), 0.0)
    assert found is not None
    assert found.slow_tokens is not None
    assert (found.tokens[0], found.slow_tokens[0]) == (16, 8)
    index.apply(batch("a", 1, AllCleared()))
    assert hits(index, TOKENS) == [0, 0, 0]
    index.check_integrity()


def test_blocks_without_a_known_parent_are_counted_and_left_out() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS, 2)))
    assert index.counts.orphans == 2
    assert index.num_blocks == 0


def test_blocks_beyond_the_bound_are_refused() -> None:
    index = PrefixIndex(num_slots=2, max_blocks=6)
    index.follow([(replica("a"), 0)])
    index.apply(batch("a", 0, stored(TOKENS), stored(list(range(40, 56)), name=1)))
    assert index.num_blocks == 4
    assert index.counts.refused == 4
    index.check_integrity()


def test_siblings_of_a_burst_are_expected_where_the_first_went_until_time_is_over() -> None:
    index = index_of("a", "b")
    asked = request(TOKENS)
    index.look_up(asked, 0.0)
    index.routed(asked, 1, 0.0)
    assert hits(index, TOKENS, 4.9) == [0, 16, 0]
    assert hits(index, TOKENS, 10.1) == [0, 0, 0]


def test_expected_blocks_carry_a_confirmed_prefix_on() -> None:
    index = index_of("a")
    index.apply(batch("a", 0, stored(TOKENS[:8])))
    asked = request(TOKENS)
    index.look_up(asked, 0.0)
    index.routed(asked, 0, 0.0)
    assert hits(index, TOKENS, 1.0) == [16, 0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_engine_hashes_may_be_signed(sign: int) -> None:
    index = index_of("a")
    name = sign * (2**62 + 5)
    index.apply(batch("a", 0, BlocksStored([name], None, TOKENS[:4], SIZE)))
    index.apply(batch("a", 1, BlocksStored([7], name, TOKENS[4:8], SIZE)))
    assert hits(index, TOKENS) == [8, 0, 0]


def test_memory_stays_bounded_under_churn() -> None:
    index = PrefixIndex(num_slots=4, max_blocks=50_000)
    index.follow([(replica("a"), 0), (replica("b"), 1)])
    rng = np.random.default_rng(3)
    most = 0
    held: list[np.ndarray] = []
    for number in range(2000):
        hashes = rng.integers(0, 2**63, 500, np.uint64)
        events: list[CacheEvent] = [BlocksKnown(hashes, hashes ^ np.uint64(9), SIZE)]
        held.append(hashes)
        if len(held) > 40:
            events.append(BlocksRemoved(held.pop(0)))
        index.apply(batch("a", number, *events))
        most = max(most, index.memory_bytes)
    assert index.num_blocks == 20_000
    assert most < 20_000 * 100 + (1 << 21)
    index.check_integrity()


class Engine:
    """What an engine holds and what it has said."""

    def __init__(self) -> None:
        self.copies: dict[tuple[int, ...], int] = {}  # prefix → copies of its last block
        self.names: dict[tuple[int, ...], int] = {}
        self.said: list[tuple[CacheEvent, ...]] = []


class IndexMachine(RuleBasedStateMachine):
    """Two engines store, copy, evict and clear; messages are lost, doubled and delayed; then replays catch up."""

    def __init__(self) -> None:
        super().__init__()
        self.boots = {"a": 1, "b": 1}
        self.engines = {"a": Engine(), "b": Engine()}
        self.index = index_of("a", "b")

    names = st.sampled_from(["a", "b"])
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4)  # a block is one number, four times

    @rule(name=names, prompt=prompts)
    def store(self, name: str, prompt: list[int]) -> None:
        """The engine computes a prompt without looking into its cache: a copy of each block."""
        engine = self.engines[name]
        hashes = []
        for depth in range(1, len(prompt) + 1):
            prefix = tuple(prompt[:depth])
            engine.copies[prefix] = engine.copies.get(prefix, 0) + 1
            hashes.append(engine.names.setdefault(prefix, len(engine.names) + 1))
        engine.said.append((BlocksStored(hashes, None, [n for n in prompt for _ in range(SIZE)], SIZE),))

    @rule(name=names, data=st.data())
    def evict(self, name: str, data: st.DataObject) -> None:
        """The last copy of a leaf, or any further copy."""
        engine = self.engines[name]
        free = [
            prefix
            for prefix, copies in engine.copies.items()
            if copies > 1
            or not any(len(p) > len(prefix) and p[: len(prefix)] == prefix for p in engine.copies)
        ]
        if free:
            prefix = data.draw(st.sampled_from(sorted(free)))
            engine.copies[prefix] -= 1
            if not engine.copies[prefix]:
                del engine.copies[prefix]
            engine.said.append((BlocksRemoved([engine.names[prefix]]),))

    @rule(name=names)
    def clear(self, name: str) -> None:
        engine = self.engines[name]
        engine.copies.clear()
        engine.said.append((AllCleared(),))

    @rule(name=names, data=st.data())
    def deliver(self, name: str, data: st.DataObject) -> None:
        """Any message of the past, once more or for the first time."""
        said = self.engines[name].said
        if said:
            number = data.draw(st.integers(0, len(said) - 1))
            self.index.apply(batch(name, number, *said[number], boot=str(self.boots[name])))

    @rule(name=names)
    def restart(self, name: str) -> None:
        self.engines[name] = Engine()
        self.boots[name] += 1
        self.follow()

    def follow(self) -> None:
        self.index.follow([(replica(n, str(self.boots[n])), slot) for slot, n in enumerate(["a", "b"])])

    @precondition(lambda self: any(engine.said for engine in self.engines.values()))
    @rule(prompt=prompts)
    def catch_up(self, prompt: list[int]) -> None:
        """After a whole replay the index knows exactly what is held."""
        for name, engine in self.engines.items():
            for number, events in enumerate(engine.said):
                self.index.apply(batch(name, number, *events, boot=str(self.boots[name])))
        expected = []
        for engine in self.engines.values():
            depth = 0
            while depth < len(prompt) and tuple(prompt[: depth + 1]) in engine.copies:
                depth += 1
            expected.append(depth * SIZE)
        assert hits(self.index, [n for n in prompt for _ in range(SIZE)])[:2] == expected

    @invariant()
    def is_sound(self) -> None:
        self.index.check_integrity()


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
