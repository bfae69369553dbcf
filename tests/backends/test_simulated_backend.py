"""What the simulated backend promises beyond the contract: vLLM's side endpoints, KV events, determinism."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import zmq
import zmq.asyncio

from headrace.backends.kv_event_wire import (
    END_OF_REPLAY,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    decode_batch,
)
from headrace.backends.simulated import SimulatedBackend
from headrace.backends.simulated_tokens import hash_blocks
from headrace.config import SimulatedEngine
from headrace.errors import ReplicaUnhealthy, SleepFailed, StartError
from headrace_router.types import ReplicaId

MODEL = "toy"
PATIENCE_S = 30.0


class Server:
    """A started simulated backend: blocks of 4 tokens, 64 of them."""

    def __init__(self, step_s: float = 0.001) -> None:
        settings = SimulatedEngine.model_validate(
            {
                "block_size": 4,
                "num_blocks": 64,
                "max_model_len": 4096,
                "step_s": step_s,
                "prefill_token_s": 0.0,
            }
        )
        self.backend = SimulatedBackend(settings, MODEL, ReplicaId("toy-0"))

    async def start(self) -> None:
        self.started = await self.backend.start(lambda _phase: None)
        url = self.started.endpoints.url
        self.client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

    async def stop(self) -> None:
        await self.client.close()
        await self.backend.stop()

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded JSON of one request."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.started.endpoints.url + path, data, method=method)

        def send() -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as e:
                with e:
                    return e.code, e.read()

        status, text = await asyncio.to_thread(send)
        return status, json.loads(text) if text else None

    async def complete(self, prompt: list[int], max_tokens: int, **more: Any) -> openai.types.Completion:
        more = {"ignore_eos": True} | more
        return await self.client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=max_tokens, extra_body=more
        )


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    await server.stop()


async def replay(server: Server, start: int) -> list[tuple[int, list[Any]]]:
    """Batches from `start` on, as a subscriber that missed them asks for them."""
    batches = []
    async with asyncio.timeout(PATIENCE_S):
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(server.started.endpoints.kv_replay or "")
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                _empty, topic, sequence, payload = await socket.recv_multipart()
                if sequence == END_OF_REPLAY:
                    return batches
                assert topic == b""
                batches.append((int.from_bytes(sequence, "big"), decode_batch(payload).events))


async def test_cache_events_tell_exactly_what_is_resident(server: Server) -> None:
    prompt = list(range(1, 11))
    answer = await server.complete(prompt, 7, return_token_ids=True)
    tokens = prompt + answer.choices[0].model_extra["token_ids"]
    batches = await replay(server, 0)
    assert [sequence for sequence, _ in batches] == list(range(len(batches)))
    events = [event for _, batch in batches for event in batch]
    assert all(isinstance(event, BlockStored) for event in events)
    assert [token for event in events for token in event.token_ids] == tokens[:16]
    assert [block_hash for event in events for block_hash in event.block_hashes] == hash_blocks(tokens, 4)[:4]
    assert [event.parent_block_hash for event in events] == [None, *hash_blocks(tokens, 4)[1:3]]
    assert await replay(server, 1) == [(sequence, batch) for sequence, batch in batches if sequence >= 1]


async def test_live_events_carry_the_sequence_of_the_replay(server: Server) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.subscribe(b"")
        socket.connect(server.started.endpoints.kv_events or "")
        number = 0
        async with asyncio.timeout(PATIENCE_S):
            # A subscription takes effect at some moment after connect; ask until the first event arrives.
            while not await socket.poll(50):
                number += 1
                await server.complete([number] * 8, 1)
            topic, sequence, payload = await socket.recv_multipart()
    assert topic == b""
    seen = int.from_bytes(sequence, "big")
    (found,) = [batch for number, batch in await replay(server, seen) if number == seen]
    assert decode_batch(payload).events == found


async def test_evictions_and_clearing_are_announced(server: Server) -> None:
    for number in range(6):
        await server.complete([1000 * number + index for index in range(60)], 1)
    status, _ = await server.call("POST", "/reset_prefix_cache")
    assert status == 200
    resident: set[Any] = set()
    kinds = set()
    for _, batch in await replay(server, 0):
        for event in batch:
            kinds.add(type(event))
            if isinstance(event, BlockStored):
                resident.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                assert resident.issuperset(event.block_hashes)
                resident.difference_update(event.block_hashes)
            else:
                resident.clear()
            assert len(resident) <= 64
    assert kinds == {BlockStored, BlockRemoved, AllBlocksCleared}
    assert not resident


async def test_usage_counts_cached_tokens_and_a_salt_hides_them(server: Server) -> None:
    prompt = list(range(50, 70))
    counts = []
    for salt in (None, None, "tenant", "tenant"):
        answer = await server.complete(prompt, 1, **({"cache_salt": salt} if salt else {}))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        counts.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert counts == [0, 16, 0, 16]


async def test_the_same_prompt_gets_the_same_answer_from_another_server(server: Server) -> None:
    other = Server()
    await other.start()
    texts = [(await one.complete([1, 2, 3], 30)).choices[0].text for one in (server, other)]
    await other.stop()
    assert texts[0] == texts[1]
    assert len(texts[0]) == 120


async def test_several_prompts_are_several_choices(server: Server) -> None:
    answer = await server.client.completions.create(model=MODEL, prompt=["abcd" * 3, "efgh"], max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


async def test_tokenize_and_detokenize_undo_each_other(server: Server) -> None:
    status, answer = await server.call("POST", "/tokenize", {"model": MODEL, "prompt": "Grüße!"})
    assert (status, answer["count"]) == (200, 2)
    assert await server.call("POST", "/detokenize", {"tokens": answer["tokens"]}) == (
        200,
        {"prompt": "Grüße!"},
    )
    status, chat = await server.call("POST", "/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    spoken = await server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=1
    )
    assert spoken.usage is not None
    assert spoken.usage.prompt_tokens == chat["count"]


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", b"[" * 20_000, 400),
        ("POST", "/v1/completions", b"\xff\xfe{}", 400),
        ("POST", "/v1/completions", {"prompt": ""}, 400),
        ("POST", "/v1/completions", {"prompt": {"a": 1}}, 400),
        ("POST", "/v1/completions", {"prompt": [1, "a"]}, 400),
        ("POST", "/v1/completions", {"prompt": [-1]}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 0}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "n": 2}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "model": "other"}, 404),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 5000}, 400),
        ("POST", "/v1/chat/completions", {"messages": []}, 400),
        ("POST", "/v1/chat/completions", {"messages": "hi"}, 400),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, 400),
        ("POST", "/tokenize", {}, 400),
        ("POST", "/detokenize", {"tokens": [2**32]}, 400),
    ],
)
async def test_every_mistake_has_its_status(
    server: Server, method: str, path: str, body: Any, expected: int
) -> None:
    status, answer = await server.call(method, path, body)
    assert status == expected
    if expected >= 400:
        assert answer["error"]["code"] == expected
        assert answer["error"]["message"]


async def test_stop_without_drain_cuts_streams_with_an_error_and_ends_a_drain() -> None:
    server = Server(step_s=0.05)
    await server.start()
    stream = await server.client.completions.create(
        model=MODEL, prompt="go on", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = aiter(stream)
    await anext(chunks)
    draining = asyncio.create_task(server.backend.stop(drain_s=600))
    await anext(chunks)
    async with asyncio.timeout(PATIENCE_S):
        await server.backend.stop()
        await draining
    with pytest.raises(openai.APIError, match="stopping"):
        async for _ in chunks:
            pass
    with pytest.raises(ReplicaUnhealthy, match="engine"):
        await server.backend.check()
    await server.stop()


async def test_a_request_that_arrives_while_the_engine_stops_is_refused() -> None:
    server = Server()
    await server.start()
    parts = server.started.endpoints.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(parts[0], int(parts[1]))
    body = b'{"prompt": "late"}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
    await server.call("GET", "/health")  # by now the head has been read: the request is past the door
    stopping = asyncio.create_task(server.backend.stop())
    await asyncio.sleep(0)
    writer.write(body)
    assert b" 503 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
    writer.close()
    await stopping
    await server.stop()


async def test_an_address_of_another_node_is_a_start_error() -> None:
    backend = SimulatedBackend(SimulatedEngine(), MODEL, ReplicaId("toy-0"), host="192.0.2.1")
    with pytest.raises(StartError, match="address of this node"):
        await backend.start(lambda _phase: None)


async def test_an_engine_that_answers_otherwise_after_sleep_is_noticed() -> None:
    settings = SimulatedEngine.model_validate({"wake_s": 0.0, "wakes_wrong": True})
    backend = SimulatedBackend(settings, "sim", ReplicaId("sim-0"))
    await backend.start(lambda _: None)
    await backend.sleep()
    with pytest.raises(SleepFailed, match="as before"):
        await backend.wake()
    await backend.stop()
