"""Gateways tell each other where they send what, until reports and events show it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.gateway.group_choices import MAX_HASHES, GroupChoices
from headrace_router.events import BlocksKnown, EventBatch
from headrace_router.policies import make_policy
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Router
from headrace_router.text_index import TextIndex
from headrace_router.types import BootId, Endpoints, LoadReport, Membership, Replica, ReplicaId, Request, Role

MODEL = "m"


def new_router(boot: str = "b", policy: str = "least_loaded") -> Router:
    router = Router(make_policy(policy, 0), index=PrefixIndex(), texts=TextIndex())
    replicas = tuple(
        Replica(
            ReplicaId(name),
            BootId(boot),
            MODEL,
            Role.UNIFIED,
            Endpoints("http://x", load="tcp://x"),
            block_size=16,
        )
        for name in ("r0", "r1")
    )
    router.set_membership(Membership(1, replicas), monotonic())
    for replica in replicas:
        router.report(report(replica.id, 1, boot), monotonic())
    return router


def report(name: str, sequence: int, boot: str = "b", waiting: int = 0) -> LoadReport:
    return LoadReport(ReplicaId(name), BootId(boot), sequence, 0, waiting, 0.0, backlog_tokens=0)


@contextmanager
def group(folder: Path, routers: list[Router]) -> Iterator[list[GroupChoices]]:
    members = [GroupChoices(router, folder, n, len(routers)) for n, router in enumerate(routers)]
    for member in members:
        member.start()
    try:
        yield members
    finally:
        for member in members:
            member.stop()


async def heard(router: Router, count: int) -> None:
    async with asyncio.timeout(5):
        while sum(load.unreported for load in router.loads.all()) != count:
            await asyncio.sleep(0)


async def test_what_comes_to_several_gateways_at_once_is_spread(tmp_path: Path) -> None:
    routers = [new_router() for _ in range(3)]
    with group(tmp_path, routers) as members:
        for number in range(12):
            assert routers[number % 3].choose(Request(MODEL, prompt_tokens=100), monotonic())
            for router in routers:
                await heard(router, number + 1)
        for router in routers:
            assert [load.unreported for load in router.loads.all()] == [6, 6]
            assert [load.unreported_tokens for load in router.loads.all()] == [600, 600]
            router.check_integrity()
        assert [member.lost for member in members] == [0, 0, 0]


async def test_a_report_that_can_show_it_ends_what_was_heard(tmp_path: Path) -> None:
    routers = [new_router(), new_router()]
    with group(tmp_path, routers):
        choice = routers[0].choose(Request(MODEL, prompt_tokens=100), monotonic())
        assert choice is not None
        await heard(routers[1], 1)
        name = choice.booking.replica.id
        now_s = monotonic()
        routers[1].report(report(name, 2), now_s)
        await heard(routers[1], 1)  # too young to be shown by it
        routers[1].report(report(name, 3, waiting=1), now_s + 1.0)
        await heard(routers[1], 0)
        load = routers[1].loads.get(name)
        assert load is not None and (load.requests, load.backlog_tokens) == (1, 0)
        routers[1].check_integrity()
        routers[0].release(choice.booking, now_s)
        assert routers[1].loads.open_bookings == 0


async def test_what_one_turn_of_the_loop_books_is_one_message(tmp_path: Path) -> None:
    routers = [new_router(), new_router()]
    with group(tmp_path, routers) as members:
        for _ in range(40):
            routers[0].choose(Request(MODEL, prompt_tokens=1), monotonic())
        await heard(routers[1], 40)
        assert members[0].sent == 1


async def test_a_booking_on_a_replica_that_restarted_meanwhile_is_not_counted(tmp_path: Path) -> None:
    routers = [new_router(), new_router("successor")]
    with group(tmp_path, routers) as members:
        routers[0].choose(Request(MODEL, prompt_tokens=1), monotonic())
        async with asyncio.timeout(5):
            while not members[0].sent:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        await heard(routers[1], 0)


async def test_one_that_is_gone_is_missed_by_nobody(tmp_path: Path) -> None:
    routers = [new_router(), new_router(), new_router()]
    with group(tmp_path, routers) as members:
        members[2].stop()
        routers[0].choose(Request(MODEL, prompt_tokens=1), monotonic())
        await heard(routers[1], 1)
        assert (members[0].sent, members[0].lost) == (1, 1)
        members[2].start()
        routers[0].choose(Request(MODEL, prompt_tokens=1), monotonic())
        await heard(routers[2], 1)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=60, unique=True), st.integers(1, 3))
@settings(max_examples=30)
def test_a_prompt_that_one_gateway_sent_is_expected_there_by_all(hashes: list[int], shared: int) -> None:
    with TemporaryDirectory() as folder:
        asyncio.run(expected_by_all(Path(folder), np.array(hashes, np.uint64), len(hashes) * shared // 4))


async def expected_by_all(folder: Path, hashes: NDArray[np.uint64], shared: int) -> None:
    routers = [new_router(policy="delay") for _ in range(3)]
    for router in routers:
        know_block_size(router)
    with group(folder, routers):
        for number, router in enumerate(
            routers
        ):  # a conversation that grows, each turn through another gateway
            turn = hashes[: shared + (len(hashes) - shared) * number // 2]
            for request in (
                Request(MODEL, prompt_tokens=16 * len(turn) + 1, block_hashes={16: turn}),
                Request(MODEL, prompt_tokens=16 * len(turn) + 1, chunk_hashes=turn),
            ):
                choice = router.choose(request, monotonic())
                assert choice is not None
                slot = choice.booking.load.slot
                held = sum(load.unreported for load in router.loads.all())
                for other in routers:
                    await heard(other, held)
                    for source in (other.index,) if request.block_hashes else (other.texts,):
                        assert source is not None
                        found = source.look_up(request, monotonic())
                        known = 0 if found is None else int(found.tokens[slot])
                        assert known >= min(16 * len(turn), request.prompt_tokens - 1) or not len(turn)
                        source.check_integrity()


def know_block_size(router: Router) -> None:
    """An index has a table for a block size once an engine has told of a block."""
    assert router.index is not None
    stored = BlocksKnown([1], np.array([1], np.uint64), 16)
    for name in ("r0", "r1"):
        router.index.apply(EventBatch(ReplicaId(name), BootId("b"), 0, [stored]))  # type: ignore[attr-defined]


async def test_a_prompt_of_a_million_tokens_is_told_in_part(tmp_path: Path) -> None:
    routers = [new_router(policy="delay"), new_router(policy="delay")]
    for router in routers:
        know_block_size(router)
    with group(tmp_path, routers) as members:
        hashes = np.arange(2, 62_502, dtype=np.uint64)
        for _ in range(3):
            request = Request(MODEL, prompt_tokens=1_000_000, block_hashes={16: hashes})
            assert routers[0].choose(request, monotonic())
        await heard(routers[1], 3)
        assert members[0].lost == 0
        assert routers[1].index is not None
        found = routers[1].index.look_up(request, monotonic())
        assert found is not None and found.tokens.max() == 16 * MAX_HASHES
