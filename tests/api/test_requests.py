"""Calls of a `Fleet` against a real gateway with simulated replicas: what comes back, what is raised, what is left."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
from disaggregated import Fleet as Replicas
from disaggregated import open_fleet

from headrace import Answer, Fleet
from headrace.api.client import Client
from headrace.api.loop_thread import LoopThread
from headrace.errors import BadRequest, CallerError, ModelNotFound, ShortageError

MODEL = "m"
SLOW = {"step_s": 0.02, "max_model_len": 8192}


class Server:
    """A gateway that serves on a thread of its own, as one in another process would."""

    def __init__(self, replicas: Replicas, thread: LoopThread) -> None:
        self.replicas = replicas
        self.thread = thread
        self.url = f"http://127.0.0.1:{replicas.port}"

    def settle(self) -> None:
        """Return once nothing runs; raises AssertionError unless all counts agree then."""
        self.thread.run(self.replicas.settled())


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    thread = LoopThread("gateway")
    options = {"prefill": 0, "decode": 0, "unified": 2, "disaggregation": "per_request", **options}
    context = open_fleet(**options)
    try:
        yield Server(thread.run(context.__aenter__()), thread)
        thread.run(context.__aexit__(None, None, None))
    finally:
        thread.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(engine=SLOW) as server:
        yield server


@pytest.fixture
def fleet(server: Server) -> Iterator[Fleet]:
    with Fleet.connect(url=server.url) as fleet:
        yield fleet
    server.settle()


def test_a_question_is_answered(fleet: Fleet) -> None:
    answer = fleet.chat("Where is the water?", max_tokens=5)
    assert answer.text
    assert answer.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    assert answer.model == MODEL
    assert answer.raw["choices"][0]["message"]["role"] == "assistant"
    assert str(answer) == answer.text


def test_a_list_of_messages_and_token_ids_are_taken_too(fleet: Fleet) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert fleet.chat(messages, model=MODEL, max_tokens=2).text
    usage = fleet.complete([5, 6, 7], max_tokens=2).usage
    assert usage is not None and usage.prompt_tokens == 3


def test_a_stream_brings_the_same_text_in_pieces_and_the_same_usage(fleet: Fleet) -> None:
    whole = fleet.complete("Tell me of rivers", max_tokens=20, temperature=0)
    stream = fleet.stream_complete("Tell me of rivers", max_tokens=20, temperature=0)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(pieces) == stream.answer.text == whole.text
    assert stream.answer.finish_reason == "length"
    assert whole.usage is not None and stream.answer.usage is not None
    assert stream.answer.usage.completion_tokens == whole.usage.completion_tokens == 20


def test_a_stream_that_is_left_early_stops_the_replica(server: Server, fleet: Fleet) -> None:
    with fleet.stream_chat("Count", max_tokens=4000, ignore_eos=True) as stream:
        assert next(stream)
        assert sum(server.replicas.in_flight(name) for name in ("u0", "u1")) == 1
    server.settle()
    assert stream.answer.finish_reason is None
    stream.close()
    assert list(stream) == []


async def test_the_same_from_an_event_loop(server: Server) -> None:
    async with Fleet.connect(url=server.url) as fleet:
        answers = await asyncio.gather(*(fleet.achat(f"Question {n}", max_tokens=3) for n in range(20)))
        assert all(isinstance(answer, Answer) and answer.text for answer in answers)
        assert (await fleet.acomplete("x", max_tokens=2)).text
        stream = fleet.astream_chat("Tell me", max_tokens=7)
        assert "".join([text async for text in stream]) == stream.answer.text
        assert [text async for text in fleet.astream_complete("Tell", max_tokens=3)]


async def test_a_cancelled_call_stops_the_replica(server: Server) -> None:
    async with Fleet.connect(url=server.url) as fleet:
        stream = fleet.astream_chat("Count", max_tokens=4000, ignore_eos=True)
        await anext(stream)
        asking = asyncio.create_task(fleet.achat("Count", max_tokens=4000, ignore_eos=True))
        await fleet.achat("x", max_tokens=1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await stream.aclose()
    await asyncio.to_thread(server.settle)


def test_many_threads_may_use_one_fleet(fleet: Fleet) -> None:
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(fleet.chat("Hello", max_tokens=3))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 16


def test_a_refusal_is_an_error_of_ours(fleet: Fleet) -> None:
    with pytest.raises(ModelNotFound, match=r"does not exist\. Known models: m"):
        fleet.chat("x", model="gpt-9")
    with pytest.raises(BadRequest, match="stream_chat"):
        fleet.chat("x", stream=True)
    with pytest.raises(BadRequest):
        fleet.complete("x " * 60_000)
    with pytest.raises(BadRequest):
        list(fleet.stream_complete("x " * 60_000))
    with pytest.raises(CallerError, match="only its address is known"):
        fleet.status()


def test_where_nothing_answers_the_address_is_told() -> None:
    with (
        Fleet.connect(url="http://127.0.0.1:9") as fleet,
        pytest.raises(ShortageError, match=r"no gateway answers at http://127.0.0.1:9"),
    ):
        fleet.chat("x")


def test_a_fleet_is_used_between_its_opening_and_its_end(server: Server) -> None:
    fleet = Fleet.connect(url=server.url + "/v1")
    with pytest.raises(CallerError, match="not open"):
        fleet.chat("x")
    with fleet:
        assert fleet.models() == [MODEL]
    fleet.close()
    with pytest.raises(CallerError, match="closed"):
        fleet.chat("x")
    with pytest.raises(CallerError, match="before"):
        fleet.start()


@asynccontextmanager
async def flooding() -> AsyncIterator[tuple[int, list[int], asyncio.Event]]:
    """A server of one long stream: its port, what it has written until now, and whether it had to stop writing."""
    written, blocked = [0], asyncio.Event()
    event = b'data: {"choices":[{"index":0,"text":"' + b"x" * 10_000 + b'"}]}\n\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        with suppress(ConnectionError):
            for _ in range(8000):
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                written[0] += len(event)
                draining = asyncio.ensure_future(writer.drain())
                done, _ = await asyncio.wait((draining,), timeout=0.3)
                if not done:
                    blocked.set()
                await draining
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], written, blocked
    finally:
        listening.close()


async def test_a_reader_that_stalls_holds_up_the_server_and_not_our_memory() -> None:
    async with flooding() as (port, written, blocked):
        client = Client(asyncio.get_running_loop(), f"http://127.0.0.1:{port}")
        stream = client.stream("/v1/completions", {})
        await anext(stream)
        await blocked.wait()
        assert written[0] < 20_000_000
        await stream.aclose()  # type: ignore[attr-defined]
        client.close()
