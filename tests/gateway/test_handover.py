"""Prefill here, decode there: whole answers whatever fails in between, and nothing held afterwards."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from disaggregated import MODEL, Fleet, open_fleet

from headrace.gateway import handover
from headrace.gateway.access_log import AccessLog

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LONG = "the river runs to the sea " * 40


async def post(
    fleet: Fleet, body: dict[str, Any], path: str = COMPLETIONS
) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await send(fleet, body, path)
    raw = await reader.read()
    writer.close()
    head, _, rest = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
    return int(lines[0].split(" ")[1]), headers, rest


async def send(
    fleet: Fleet, body: dict[str, Any], path: str = COMPLETIONS
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    content = json.dumps({"model": MODEL, **body}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
    writer.write(
        f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-headrace-explain: 1\r\n"
        f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return reader, writer


async def answer(fleet: Fleet, body: dict[str, Any], path: str = COMPLETIONS) -> dict[str, Any]:
    status, _, content = await post(fleet, body, path)
    assert status == 200, content
    told: dict[str, Any] = json.loads(content)
    return told


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def test_an_answer_that_was_handed_over_is_the_same_as_one_that_was_not() -> None:
    body = {"prompt": LONG, "max_tokens": 24, "ignore_eos": True}
    async with open_fleet(disaggregation="never_remote") as fleet:
        alone = await answer(fleet, body)
        await fleet.settled()
        assert fleet.outcomes() == {}
    async with open_fleet() as fleet:
        status, headers, content = await post(fleet, body)
        handed = json.loads(content)
        assert (status, fleet.engine("p0").prompt_tokens_total) == (200, handed["usage"]["prompt_tokens"])
        assert fleet.engine("p0").generation_tokens_total == 1
        assert headers["x-headrace-replica"] == "d0"
        assert headers["x-headrace-prefill"].startswith("p0; ")
        await fleet.settled()
        assert fleet.outcomes() == {"completed": 1}
    assert handed["choices"] == alone["choices"]
    assert handed["usage"] == alone["usage"]


async def test_cached_tokens_are_those_of_the_replica_that_computed_the_prompt() -> None:
    body = {"prompt": LONG, "max_tokens": 4}
    async with open_fleet(decode=2) as fleet:
        first, second = await answer(fleet, body), await answer(fleet, body)
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
        await fleet.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_is_handed_over_streamed_and_whole(stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": LONG}], "max_completion_tokens": 20, "stream": stream}
    async with open_fleet() as fleet:
        status, _, content = await post(fleet, body, CHAT)
        assert status == 200
        assert (b"[DONE]" in content) == stream
        await fleet.settled()
        assert fleet.outcomes() == {"completed": 1}
        assert fleet.context.metrics.of(MODEL).completion_tokens > 1


async def test_transfers_are_reported() -> None:
    async with open_fleet() as fleet:
        await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        load = fleet.context.router.loads.get("d0")
        assert load is not None
        before = load.transfer_model.duration_s(10_000)
        for number in range(12):
            await answer(fleet, {"prompt": f"{number} {LONG}", "max_tokens": 4})
        await until(lambda: load.transfer_model.duration_s(10_000) != before)
        await fleet.settled()


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"echo": True},
        {"prompt_logprobs": 1},
        {"best_of": 2},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
    ],
    ids=str,
)
def test_requests_that_ask_about_their_prompt_or_for_several_answers_stay_whole(
    extra: dict[str, Any],
) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x", **extra}).encode()
    assert not handover.can_hand_over(COMPLETIONS.encode(), body)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/responses"])
async def test_a_client_cannot_name_whose_blocks_to_fetch(path: str) -> None:
    async with open_fleet() as fleet:
        fetch = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 1}
        body = {"prompt": "x", "input": "x", "kv_transfer_params": fetch}
        status, _, content = await post(fleet, body, path)
        assert (status, json.loads(content)["error"]["param"]) == (400, "kv_transfer_params")
        await fleet.settled()
        assert fleet.outcomes() == {}


@pytest.mark.parametrize("prompt", ["x", [1, 2, 3], ["x"], [[1, 2]]], ids=str)
def test_one_prompt_in_any_form_may_be_handed_over(prompt: Any) -> None:
    body = json.dumps({"model": MODEL, "prompt": prompt, "n": 1}).encode()
    assert handover.can_hand_over(COMPLETIONS.encode(), body)
    assert not handover.can_hand_over(b"/v1/embeddings", body)


def test_the_first_half_is_cut_to_one_token_whatever_the_client_asked() -> None:
    body = (
        b'{"model":"m","messages":[],"max_tokens":99,"stream":true,"stream_options":{"include_usage":true}} '
    )
    half = json.loads(handover.first_half(body, CHAT.encode(), "NixlConnector"))
    assert (half["max_tokens"], half["max_completion_tokens"], half["min_tokens"]) == (1, 1, 0)
    assert (half["stream"], half["stream_options"]) == (False, None)
    assert half["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}


def test_the_second_half_is_the_body_and_one_field() -> None:
    body = b'{ "model": "m",  "seed" : 1.50 }'
    assert (
        handover.second_half(body, b'{"a":1}')
        == b'{"kv_transfer_params":{"a":1}, "model": "m",  "seed" : 1.50 }'
    )
    assert handover.second_half(body, b"") is body


async def test_a_refusal_of_the_first_half_is_the_clients_and_final() -> None:
    async with open_fleet(prefill=2) as fleet:
        status, _, content = await post(fleet, {"prompt": [1] * 5000, "max_tokens": 4})
        assert status == 400
        assert "maximum context length" in json.loads(content)["error"]["message"]
        await fleet.settled()
        assert fleet.outcomes() == {"refused": 1}
        assert fleet.context.metrics.of(MODEL).retries == 0


async def test_a_refusal_of_the_second_half_frees_what_the_first_holds() -> None:
    async with open_fleet() as fleet:
        status, _, _ = await post(fleet, {"prompt": LONG, "max_tokens": 4090})
        assert status == 400
        await fleet.settled()
        assert fleet.outcomes() == {"refused": 1}


async def test_a_dead_prefilling_replica_is_replaced_by_another() -> None:
    async with open_fleet(prefill=2) as fleet:
        await fleet.kill("p0")
        for _ in range(4):
            await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        await fleet.settled()
        assert fleet.outcomes()["completed"] == 4


async def test_without_a_prefilling_replica_whoever_answers_computes_the_prompt() -> None:
    async with open_fleet() as fleet:
        await fleet.kill("p0")
        told = await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        assert fleet.engine("d0").prompt_tokens_total == told["usage"]["prompt_tokens"]
        await fleet.settled()
        assert fleet.outcomes() == {"prefill_failed": 1}


async def test_a_replica_that_dies_while_it_prefills_is_replaced() -> None:
    async with open_fleet(engine={"prefill_token_s": 0.01}) as fleet:
        asked = [
            asyncio.create_task(answer(fleet, {"prompt": f"{n}" * 200, "max_tokens": 4})) for n in range(4)
        ]
        await until(lambda: fleet.in_flight("p0") == 4)
        await fleet.kill("p0")
        assert len(await asyncio.gather(*asked)) == 4
        await fleet.settled()
        assert fleet.outcomes() == {"prefill_failed": 4}


async def test_a_prefilling_replica_that_leaves_the_fleet_unheard_is_replaced() -> None:
    async with open_fleet(engine={"prefill_token_s": 0.01}) as fleet:
        asked = asyncio.create_task(answer(fleet, {"prompt": LONG, "max_tokens": 4}))
        await until(lambda: fleet.in_flight("p0"))
        fleet.tell("p0")
        await asked
        await fleet.settled()
        assert fleet.outcomes() == {"prefill_failed": 1}


async def test_blocks_that_do_not_come_are_computed_again() -> None:
    """The prefilling replica dies between the halves, or the lease ends before the other side asks."""
    async with open_fleet(engine={"kv_lease_s": 1e-6}) as fleet:
        told = await answer(fleet, {"prompt": LONG, "max_tokens": 8, "ignore_eos": True})
        assert told["usage"]["completion_tokens"] == 8
        await fleet.settled()


async def test_a_dead_decoding_replica_is_replaced_and_the_blocks_are_freed() -> None:
    async with open_fleet(decode=2) as fleet:
        await fleet.kill("d0")
        for _ in range(4):
            await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        await fleet.settled()
        assert fleet.outcomes()["completed"] == 4


async def test_with_no_decoding_replica_left_the_prefilling_one_answers() -> None:
    async with open_fleet() as fleet:
        await fleet.kill("d0")
        told = await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        assert told["usage"]["completion_tokens"] >= 1
        await fleet.settled()
        assert fleet.outcomes() == {"decode_failed": 1}


async def test_a_decoding_replica_that_dies_before_its_first_token_is_replaced() -> None:
    async with open_fleet(decode=2, engine={"transfer_token_s": 0.02}) as fleet:
        asked = asyncio.create_task(answer(fleet, {"prompt": LONG, "max_tokens": 4}))
        await until(lambda: fleet.engine("d0").kv_use or fleet.engine("d1").kv_use)
        dying = "d0" if fleet.engine("d0").kv_use else "d1"
        fleet.backends["d1" if dying == "d0" else "d0"]._loop.engine.settings = fleet.engine(
            dying
        ).settings.model_copy(update={"transfer_token_s": 0.0})
        await fleet.kill(dying)
        await asked
        await fleet.settled()


@pytest.mark.parametrize(
    ("dying", "slow"), [("p0", {"prefill_token_s": 1e-4}), ("d0", {"transfer_token_s": 5e-4})], ids=str
)
async def test_a_hundred_requests_outlive_a_killed_replica(dying: str, slow: dict[str, float]) -> None:
    async with open_fleet(2, 2, engine={**slow, "kv_lease_s": 3600}) as fleet:
        asked = [
            asyncio.create_task(answer(fleet, {"prompt": f"{n} {LONG}", "max_tokens": 8})) for n in range(100)
        ]
        await until(lambda: fleet.in_flight(dying) >= 10)
        await fleet.kill(dying)
        assert len(await asyncio.gather(*asked)) == 100
        await fleet.settled()


async def test_a_client_that_leaves_during_the_first_half_frees_it_at_once() -> None:
    async with open_fleet(engine={"prefill_token_s": 0.01}) as fleet:
        _, writer = await send(fleet, {"prompt": LONG, "max_tokens": 4})
        await until(lambda: fleet.in_flight("p0"))
        writer.transport.abort()
        await fleet.settled()
        assert fleet.outcomes() == {"abandoned": 1}


async def test_a_client_that_leaves_between_the_halves_frees_the_blocks_at_once() -> None:
    """The decoding replica waits for room, so that nobody has fetched anything yet."""
    async with open_fleet(engine={"kv_lease_s": 3600}) as fleet:
        busy = fleet.engine("d0")
        busy.add("busy", 4000, 90)  # never finished: the loop is not told of it
        busy.settings = busy.settings.model_copy(update={"max_running": 1})
        while not busy.running:
            busy.step()
        _, writer = await send(fleet, {"prompt": LONG, "max_tokens": 4})
        await until(lambda: fleet.engine("p0").generation_tokens_total and busy.waiting)
        assert fleet.engine("p0").kv_use > 0
        writer.transport.abort()
        await until(lambda: fleet.engine("p0").kv_use == 0)
        busy.abort("busy")
        await fleet.settled()
        assert fleet.outcomes() == {"abandoned": 1}


async def test_explain_names_both_replicas() -> None:
    async with open_fleet() as fleet:
        await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        (entry,) = fleet.context.decisions.latest(1)
        assert (entry["replica"], entry["prefill"]["replica"]) == ("d0", "p0")
        assert entry["prefill"]["moved_tokens"] > 0
        await fleet.settled()


async def test_flexible_replicas_hand_over_to_each_other() -> None:
    async with open_fleet(0, 0, 2, policy="delay") as fleet:
        for number in range(4):
            await answer(fleet, {"prompt": f"{number} {LONG}", "max_tokens": 4})
        await fleet.settled()
        assert fleet.outcomes() == {"completed": 4}


async def test_the_access_log_names_both_replicas() -> None:
    lines = io.BytesIO()
    async with open_fleet() as fleet:
        fleet.context.access_log = AccessLog(lines)
        await answer(fleet, {"prompt": LONG, "max_tokens": 4})
        await fleet.settled()
        told = json.loads(fleet.context.access_log.take())
    assert (told["replica"], told["prefill"], told["status"]) == ("d0", "p0", 200)
