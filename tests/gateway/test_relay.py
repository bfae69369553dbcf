"""What a client sees of the relay, whichever face it comes through."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from headrace.config import Timeouts
from headrace_router.types import BootId

Open = Callable[..., Any]
STREAM = {"model": "m", "prompt": "x", "stream": True}


async def test_answer_is_relayed_with_its_request_id(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post(
            {"model": "m", "prompt": "x"}, headers="connection: close\r\nx-request-id: mine-1\r\n"
        )
        assert response.status == 200
        assert response.json()["by"] == "a"
        assert response.headers["x-request-id"] == "mine-1"
        assert b"x-request-id: mine-1\r\n" in gateway.replicas[0].heads[0]
        await gateway.settled()


async def test_replicas_get_the_internal_token_and_never_the_clients_key(front: Open, face: str) -> None:
    async with front(face) as gateway:
        await gateway.post(
            {"model": "m"}, headers="connection: close\r\nauthorization: Bearer client-key\r\n"
        )
        head = gateway.replicas[0].heads[0]
        assert b"authorization: Bearer secret\r\n" in head
        assert b"client-key" not in head


async def test_stream_arrives_whole_without_the_usage_nobody_asked_for(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post(STREAM)
        assert response.headers["content-type"] == "text/event-stream"
        assert response.body.count(b"data: ") == 4
        assert response.body.endswith(b"data: [DONE]\n\n")
        assert b"usage" not in response.body
        await gateway.settled()
        assert gateway.context.metrics.of("m").completion_tokens == 3


async def test_stream_keeps_the_usage_that_was_asked_for(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post(STREAM | {"stream_options": {"include_usage": True}})
        assert b'"usage":{"prompt_tokens":5' in response.body
        await gateway.settled()
        assert gateway.context.metrics.of("m").prompt_tokens == 5


async def test_body_reaches_the_replica_byte_for_byte(front: Open) -> None:
    async with front() as gateway:
        body = b'{ "model":"m",  "prompt":"\\u00e9",   "x":1.50 }'
        await gateway.post(body)
        assert gateway.replicas[0].requests[0] == json.loads(body)
        assert b"content-length: %d\r\n" % len(body) in gateway.replicas[0].heads[0]


async def test_unknown_model_gets_openai_404(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "other"})
        assert response.status == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"


async def test_configured_model_without_replicas_is_a_503_to_be_tried_again(front: Open, face: str) -> None:
    async with front(face) as gateway:
        gateway.source.change([], models=("m",))
        while gateway.context.membership.replicas:
            await asyncio.sleep(0)
        response = await gateway.post({"model": "m"})
        assert response.status == 503
        assert response.json()["error"]["code"] == "no_replica"
        assert "retry-after" in response.headers
        assert (await gateway.post({"model": "other"})).status == 404


async def test_path_that_the_model_does_not_offer_is_a_404_in_openais_form(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m", "script": {"all": "no_route"}}, path="/v1/embeddings")
        assert response.status == 404
        assert response.json()["error"]["message"] == "the model `m` does not offer /v1/embeddings"
        await gateway.settled()


async def test_errors_on_anthropics_path_have_anthropics_form(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "other"}, path="/v1/messages")
        assert response.status == 404
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "not_found_error"


async def test_relayed_errors_are_not_counted_as_fast_tokens(front: Open, face: str) -> None:
    async with front(face) as gateway:
        await gateway.post({"model": "m", "script": {"all": "status400"}})
        await gateway.settled()
        measures = gateway.context.metrics.of("m")
        assert measures.ended == {(400, "replica_answer"): 1}
        assert measures.time_to_first_token.count == 0


async def test_decision_is_explained_when_asked_for_and_kept(front: Open, face: str) -> None:
    async with front(face, policy="delay") as gateway:
        silent = await gateway.post({"model": "m", "prompt": "x"})
        assert not any(name.startswith("x-headrace") for name in silent.headers)
        told = await gateway.post(
            {"model": "m", "prompt": "x " * 600},
            headers="connection: close\r\nx-headrace-explain: 1\r\nx-request-id: why\r\n",
        )
        assert told.headers["x-headrace-replica"] == told.json()["by"]
        assert "policy=delay; basis=text (no tokenizer)" in told.headers["x-headrace-decision"]
        raw = await gateway.raw(b"GET /headrace/decisions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        latest = json.loads(raw.partition(b"\r\n\r\n")[2])["decisions"][0]
        assert latest["request_id"] == "why"
        assert [candidate["replica"] for candidate in latest["candidates"]] == ["a", "b"]


async def test_repeated_prompt_returns_to_the_replica_that_has_it(front: Open, face: str) -> None:
    async with front(face, policy="delay") as gateway:
        prompts = [f"{name} " * 1200 for name in ("one", "two", "three")]
        homes = [(await gateway.post({"model": "m", "prompt": prompt})).json()["by"] for prompt in prompts]
        for _ in range(3):
            again = [
                (await gateway.post({"model": "m", "prompt": prompt})).json()["by"] for prompt in prompts
            ]
            assert again == homes
        await gateway.settled()


async def test_reset_before_the_answer_is_retried_on_another_replica(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m", "script": {"a": "reset"}})
        assert response.status == 200
        assert response.json()["by"] == "b"
        assert len(gateway.replicas[0].requests) == 1
        assert gateway.context.metrics.of("m").retries == 1
        await gateway.settled()


async def test_replicas_that_take_no_connection_use_up_no_retry(front: Open, face: str) -> None:
    """With a node go several replicas at once."""
    async with front(face, num_replicas=5, retries=1) as gateway:
        for replica in gateway.replicas[1:4]:
            await replica.close()
        response = await gateway.post({"model": "m", "script": {"a": "reset"}})
        assert (response.status, response.json()["by"]) == (200, "e")
        await gateway.settled()


async def test_a_request_that_kills_replicas_kills_one_more_than_it_has_retries(
    front: Open, face: str
) -> None:
    async with front(face, num_replicas=5, retries=1) as gateway:
        response = await gateway.post({"model": "m", "script": {"all": "reset"}})
        assert response.status == 502
        assert sum(len(replica.requests) for replica in gateway.replicas) == 2
        await gateway.settled()


async def test_all_replicas_resetting_is_a_502_that_can_be_retried(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m", "script": {"all": "reset"}})
        assert response.status == 502
        assert response.json()["error"]["code"] == "upstream_failed"
        assert "retry-after" in response.headers
        assert [len(replica.requests) for replica in gateway.replicas] == [1, 1]
        await gateway.settled()


async def test_ill_replica_is_left_for_another_one(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m", "script": {"a": "status503"}})
        assert response.json()["by"] == "b"
        await gateway.settled()


async def test_illness_of_all_is_relayed_as_it_is(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m", "script": {"all": "status503"}})
        assert response.status == 503
        assert response.json()["error"]["message"] == "scripted"
        await gateway.settled()


async def test_clients_error_is_not_retried(front: Open, face: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m", "script": {"all": "status400"}})
        assert response.status == 400
        assert sum(len(replica.requests) for replica in gateway.replicas) == 1


async def test_unreachable_replica_leaves_the_view_and_costs_the_client_nothing(
    front: Open, face: str
) -> None:
    async with front(face) as gateway:
        await gateway.replicas[0].close()
        for _ in range(4):
            response = await gateway.post({"model": "m"})
            assert response.json()["by"] == "b"
        assert [load.replica.id for load in gateway.context.router.eligible("m")] == ["b"]
        await gateway.settled()


async def test_replica_dying_in_a_stream_ends_it_with_an_error_event(front: Open, face: str) -> None:
    async with front(face, num_replicas=1) as gateway:
        response = await gateway.post(STREAM | {"script": {"all": "cut"}})
        events = response.body.split(b"\n\n")
        assert len([e for e in events if b"choices" in e]) == 3
        assert b"half" not in response.body
        assert json.loads(events[3].removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
        await gateway.settled()


@pytest.mark.parametrize("script", ["hang", "stream_then_hang"])
async def test_client_leaving_stops_the_replica(front: Open, face: str, script: str) -> None:
    async with front(face, num_replicas=1) as gateway:
        _, writer = await gateway.connect()
        writer.write(gateway_request(STREAM | {"script": {"all": script}}))
        replica = gateway.replicas[0]
        await replica.started.wait()
        assert gateway.context.router.loads.open_bookings == 1
        writer.transport.abort()
        await asyncio.wait_for(replica.aborted.wait(), 10)
        await gateway.settled()
        assert gateway.context.metrics.of("m").ended == {(499, "client_left"): 1}


async def test_silent_replica_is_a_504(front: Open, face: str) -> None:
    async with front(face, timeouts=Timeouts(first_byte_s=0.2), retries=0) as gateway:
        response = await gateway.post({"model": "m", "script": {"all": "hang"}})
        assert response.status == 504
        assert response.json()["error"]["code"] == "upstream_timeout"
        await gateway.settled()
        await asyncio.wait_for(gateway.replicas[0].aborted.wait(), 10)


async def test_stream_that_falls_silent_ends_with_an_error_event(front: Open, face: str) -> None:
    async with front(face, timeouts=Timeouts(idle_s=0.2)) as gateway:
        response = await gateway.post(STREAM | {"script": {"all": "stream_then_hang"}})
        assert response.body.count(b"choices") == 3
        assert b'"code":"upstream_timeout"' in response.body
        await gateway.settled()


async def test_head_long_before_the_first_token_is_no_silence(front: Open) -> None:
    """vLLM sends a stream's head at once and its first token after the prefill."""
    async with front(num_replicas=1) as gateway:
        reader, writer = await gateway.connect()
        writer.write(gateway_request(STREAM | {"script": {"all": "head_first"}}))
        await reader.readuntil(b"\r\n\r\n")
        gateway.context.expire()
        gateway.replicas[0].go_on.set()
        assert (await reader.read()).count(b"choices") == 3
        writer.close()


async def test_stalled_client_pauses_the_replica_instead_of_filling_memory(front: Open, face: str) -> None:
    async with front(face, num_replicas=1) as gateway:
        reader, writer = await gateway.connect()
        writer.write(gateway_request(STREAM | {"script": {"all": "flood"}}))
        replica = gateway.replicas[0]
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.wait_for(replica.blocked.wait(), 30)
        # What lies between both ends: kernel buffers (several MB on loopback), and 64 KiB in the gateway.
        assert replica.written < 20_000_000
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        body = await reader.read()
        assert body.count(b"data: x") == 800
        writer.close()
        await gateway.settled()


async def test_stalled_client_is_cut_after_its_time(front: Open) -> None:
    async with front(num_replicas=1, timeouts=Timeouts(client_stall_s=0.2)) as gateway:
        reader, writer = await gateway.connect()
        writer.write(gateway_request(STREAM | {"script": {"all": "flood"}}))
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await gateway.replicas[0].started.wait()
        while gateway.context.active:
            await asyncio.sleep(0.01)
        await gateway.settled()
        assert (200, "client_stalled") in gateway.context.metrics.of("m").ended
        writer.transport.abort()


async def test_connection_closed_by_an_idle_replica_is_replaced_unseen(front: Open, face: str) -> None:
    async with front(face, num_replicas=1, retries=0) as gateway:
        for _ in range(3):
            response = await gateway.post({"model": "m", "script": {"all": "answer_and_close"}})
            assert response.status == 200
        await gateway.settled()


async def test_a_head_that_was_held_back_is_forgotten_with_its_connection(front: Open, face: str) -> None:
    """Of a 404 whose body was to tell what it means."""
    async with front(face, num_replicas=1) as gateway:
        for _ in range(3):
            response = await gateway.post({"model": "m", "script": {"all": "half_404"}})
            assert response.raw.count(b"HTTP/1.1") == 1
            assert response.status == 200
        await gateway.settled()


async def test_unanswered_request_moves_when_its_replica_leaves_the_fleet(front: Open, face: str) -> None:
    async with front(face) as gateway:
        answering = asyncio.ensure_future(gateway.post({"model": "m", "script": {"a": "hang"}}))
        await gateway.replicas[0].started.wait()
        gateway.source.change([gateway.replicas[1].replica])
        response = await answering
        assert response.json()["by"] == "b"
        await gateway.settled()


async def test_restarted_replica_is_not_confused_with_its_predecessor(front: Open) -> None:
    """It has not been tried: a request that its predecessor took with it goes there."""
    async with front(num_replicas=1) as gateway:
        answering = asyncio.ensure_future(gateway.post({"model": "m", "script": {"a": "hang_once"}}))
        await gateway.replicas[0].started.wait()
        before = gateway.context.router.loads.get("a")
        gateway.source.change([replace(gateway.replicas[0].replica, boot_id=BootId("second"))])
        assert (await answering).status == 200
        assert gateway.context.router.loads.get("a") is not before
        assert before.booked == 0
        await gateway.settled()


async def test_stop_lets_a_stream_finish_and_refuses_new_work(front: Open) -> None:
    async with front(num_replicas=1) as gateway:
        reader, writer = await gateway.connect()
        writer.write(gateway_request(STREAM | {"script": {"all": "stream_then_hang"}}))
        await reader.readuntil(b"\r\n\r\n")
        stopping = asyncio.ensure_future(gateway.server.stop(drain_s=0.3))
        rest = await reader.read()
        await stopping
        assert rest.count(b"choices") == 3
        assert b'"code":"shutting_down"' in rest
        writer.close()
        await asyncio.wait_for(gateway.replicas[0].aborted.wait(), 10)


def gateway_request(body: Any) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        % (
            len(content),
            content,
        )
    )
