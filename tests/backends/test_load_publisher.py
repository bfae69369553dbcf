"""Load reports over ZMQ: newest wins, nothing goes backwards, silence is broken by heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from headrace.backends.load_publisher import MAX_ITERATIONS, LoadPublisher, decode_report
from headrace_router.types import BootId, Iteration, LoadReport, ReplicaId, Transfer

PATIENCE_S = 10.0


def report(
    running: int = 0, iterations: tuple[Iteration, ...] = (), transfers: tuple[Transfer, ...] = ()
) -> LoadReport:
    return LoadReport(
        ReplicaId("r-0"), BootId("b"), 0, running, 0, 0.5, 7, iterations=iterations, transfers=transfers
    )


class Reader:
    """Decodes what one publisher sends."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(b"")
        self._socket.connect(endpoint)

    async def next(self) -> LoadReport:
        return decode_report(await asyncio.wait_for(self._socket.recv(), PATIENCE_S))

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
async def publisher() -> AsyncIterator[LoadPublisher]:
    publisher = LoadPublisher("127.0.0.1", 0.02)
    publisher.start()
    yield publisher
    await publisher.stop()


async def test_heartbeats_repeat_the_newest_report_with_growing_sequences(publisher: LoadPublisher) -> None:
    publisher.publish(report(running=3))
    reader = Reader(publisher.start())
    seen = [await reader.next() for _ in range(3)]
    reader.close()
    assert [one.running for one in seen] == [3, 3, 3]
    first = seen[0].sequence
    assert [one.sequence for one in seen] == [first, first + 1, first + 2]


async def test_a_burst_becomes_one_message_with_every_iteration(publisher: LoadPublisher) -> None:
    publisher.publish(report())
    reader = Reader(publisher.start())
    await reader.next()
    for step in range(5):
        publisher.publish(report(running=step, iterations=(Iteration(0.01, step, 1),)))
    while not (seen := await reader.next()).iterations:
        pass
    reader.close()
    assert seen.running == 4
    assert [one.prefill_tokens for one in seen.iterations] == [0, 1, 2, 3, 4]


async def test_iterations_are_sent_once_and_only_the_newest_fit(publisher: LoadPublisher) -> None:
    publisher.publish(report())
    reader = Reader(publisher.start())
    await reader.next()
    for step in range(MAX_ITERATIONS + 10):
        publisher.publish(report(iterations=(Iteration(0.01, step, 1),)))
    while not (seen := await reader.next()).iterations:
        pass
    after = await reader.next()
    reader.close()
    assert [one.prefill_tokens for one in seen.iterations] == list(range(10, MAX_ITERATIONS + 10))
    assert after.iterations == ()


async def test_transfers_are_sent_once_and_joined(publisher: LoadPublisher) -> None:
    publisher.publish(report())
    reader = Reader(publisher.start())
    await reader.next()
    for tokens in (100, 200):
        publisher.publish(report(transfers=(Transfer(tokens, 0.25),)))
    while not (seen := await reader.next()).transfers:
        pass
    after = await reader.next()
    reader.close()
    assert seen.transfers == (Transfer(100, 0.25), Transfer(200, 0.25))
    assert after.transfers == ()


async def test_stop_is_safe_twice_before_start_and_releases_the_port(publisher: LoadPublisher) -> None:
    endpoint = publisher.start()
    publisher.publish(report())
    await publisher.stop()
    await publisher.stop()
    publisher.publish(report(running=9))
    assert publisher.newest is not None
    assert publisher.newest.running == 9
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.bind(endpoint)
    await LoadPublisher("127.0.0.1", 0.1).stop()


def test_foreign_bytes_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a load report"):
        decode_report(b"\xc1 nonsense")
    with pytest.raises(ValueError, match="not a load report"):
        decode_report(b"\x81\xa7running\x01")
