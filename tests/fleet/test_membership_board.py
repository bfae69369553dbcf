"""Versions and those who wait for them."""

import asyncio

from headrace.fleet.membership_board import MembershipBoard
from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Role


def replica(name: str, boot: str = "b") -> Replica:
    return Replica(ReplicaId(name), BootId(boot), "m", Role.UNIFIED, Endpoints("http://127.0.0.1:1"))


async def test_whoever_knows_nothing_is_answered_at_once() -> None:
    board = MembershipBoard()
    assert (await board.watch("", -1, 60)).version == 0


async def test_whoever_knows_it_all_waits_for_the_next_version() -> None:
    board = MembershipBoard()
    known = board.current
    waiting = [asyncio.create_task(board.watch(known.epoch, known.version, 60)) for _ in range(3)]
    await asyncio.sleep(0)
    board.publish([replica("a")])
    assert [membership.version for membership in await asyncio.gather(*waiting)] == [1, 1, 1]


async def test_a_poll_that_is_cancelled_as_the_news_come_is_cancelled() -> None:
    for turns in range(4):
        board = MembershipBoard()
        known = board.current
        waiting = asyncio.create_task(board.watch(known.epoch, known.version, 60))
        await asyncio.sleep(0)
        board.publish([replica("a")])
        for _ in range(turns):
            await asyncio.sleep(0)
        was_over = waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() or was_over, f"lost {turns} turns of the loop after the news"


async def test_a_poll_without_news_ends_with_what_was_known() -> None:
    board = MembershipBoard()
    known = board.current
    assert await board.watch(known.epoch, known.version, 0.001) is known


async def test_a_version_missed_between_two_polls_is_not_lost() -> None:
    board = MembershipBoard()
    known = board.current
    board.publish([replica("a")])
    board.publish([replica("a"), replica("b")])
    assert (await board.watch(known.epoch, known.version, 60)).version == 2


async def test_the_same_members_are_no_news_but_another_boot_is() -> None:
    board = MembershipBoard()
    board.publish([replica("a")])
    board.publish([replica("a")])
    assert board.current.version == 1
    board.publish([replica("a", boot="c")])
    assert board.current.version == 2


async def test_another_board_is_another_epoch() -> None:
    assert MembershipBoard().current.epoch != MembershipBoard().current.epoch


async def test_configured_models_are_told_before_and_after_their_replicas() -> None:
    board = MembershipBoard(["m", "n"])
    assert board.current.models == ("m", "n")
    board.publish([replica("a")])
    board.publish([])
    assert board.current.models == ("m", "n")


async def test_a_model_that_may_come_is_news() -> None:
    board = MembershipBoard(["m"])
    board.publish([], ["m"])
    assert (board.current.version, board.current.coming) == (1, ("m",))
    board.publish([], ["m"])
    assert board.current.version == 1


async def test_readers_say_by_asking_again_what_they_know() -> None:
    board = MembershipBoard()
    first = asyncio.create_task(board.watch(board.current.epoch, 0, 60, "gateway"))
    await asyncio.sleep(0)
    board.publish([replica("a")])
    heard = asyncio.create_task(board.heard(1, 60))
    await first
    assert not heard.done(), "it was told, and may not have acted on it"
    again = asyncio.create_task(board.watch(board.current.epoch, 1, 60, "gateway"))
    assert await heard
    again.cancel()


async def test_a_reader_that_does_not_come_back_is_waited_for_once() -> None:
    board = MembershipBoard()
    await board.watch(board.current.epoch, 0, 0.001, "gateway")
    board.publish([replica("a")])
    assert not await board.heard(1, 0.01)
    assert await board.heard(1, 0.01)


async def test_without_readers_everybody_has_heard() -> None:
    board = MembershipBoard()
    board.publish([replica("a")])
    assert await board.heard(1, 60)
