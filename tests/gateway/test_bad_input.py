"""Hostile and careless clients: a clear 4xx in OpenAI's form or a clean close, and the gateway serves on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from headrace.config import Timeouts

Open = Callable[..., Any]


def post(body: bytes, head: bytes = b"") -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (
        head,
        len(body),
        body,
    )


GOOD = b'{"model":"m","prompt":"x"}'

BAD_BODIES = {
    "empty": (b"", 400, "empty"),
    "not JSON": (b"hello", 400, "JSON"),
    "cut JSON": (b'{"model":"m"', 400, "JSON"),
    "an array": (b'["m"]', 400, "JSON"),
    "trailing data": (b'{"model":"m"} {}', 400, "JSON"),
    "model missing": (b'{"prompt":"x"}', 400, "model"),
    "model a number": (b'{"model":5}', 400, "string"),
    "model an object": (b'{"model":{}}', 400, "string"),
    "model null": (b'{"model":null}', 400, "model"),
    "model unknown": (b'{"model":"nope"}', 404, "nope"),
    "invalid UTF-8": (b'{"model":"m","prompt":"\xff\xfe"}', 400, "UTF-8"),
    "nested 10,000 deep": (b'{"model":"m","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "JSON"),
    "nested 200 deep": (b'{"model":"m","x":' + b"[" * 200 + b"]" * 200 + b"}", 400, "deeper than 128"),
    "unclosed 100,000 deep": (b'{"model":"m","x":' + b"[" * 100_000, 400, "JSON"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_body_never_reaches_a_replica(front: Open, face: str, name: str) -> None:
    body, status, words = BAD_BODIES[name]
    async with front(face) as gateway:
        response = await gateway.post(body)
        assert response.status == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]
        assert not any(replica.requests for replica in gateway.replicas)
        await gateway.settled()
        assert (await gateway.post({"model": "m"})).status == 200


BAD_HEADS = {
    "garbage": (b"GARBAGE\r\n\r\n", 400),
    "binary": (bytes(range(256)) * 4, 400),
    "no such version": (b"POST /v1/completions HTTP/9.9\r\n\r\n", 400),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100, 400),
    "two lengths": (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
    "length and chunked": (
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        400,
    ),
    "length not a number": (b"POST /v1/completions HTTP/1.1\r\ncontent-length: abc\r\n\r\n", 400),
    "bad chunk": (b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    "head too large": (b"POST /v1/completions HTTP/1.1\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    "endless head": (b"POST /v1/completions HTTP/1.1\r\n" + b"x: y\r\n" * 5_000, 431),
    "endless target": (b"POST /" + b"a" * 20_000, 431),
    "body too large, told": (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", 413),
    "absolute target": (b"GET http://elsewhere/v1/models HTTP/1.1\r\nhost: x\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", BAD_HEADS)
async def test_bad_http_is_refused_and_the_gateway_serves_on(front: Open, name: str) -> None:
    data, status = BAD_HEADS[name]
    async with front() as gateway:
        raw = await asyncio.wait_for(gateway.raw(data), 10)
        assert raw.startswith(b"HTTP/1.1 %d " % status), raw[:200]
        assert json.loads(raw.partition(b"\r\n\r\n")[2])["error"]["message"]
        await gateway.settled()
        assert (await gateway.post({"model": "m"})).status == 200


async def test_body_too_large_in_chunks_is_refused(front: Open, face: str) -> None:
    async with front(face, body_bytes=4096) as gateway:
        chunk = b"800\r\n" + b"x" * 2048 + b"\r\n"
        raw = await gateway.raw(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
            + chunk * 3
        )
        assert raw.startswith(b"HTTP/1.1 413 ")


async def test_slow_head_gets_408(front: Open) -> None:
    async with front(timeouts=Timeouts(head_s=0.2)) as gateway:
        raw = await asyncio.wait_for(gateway.raw(b"POST /v1/comp"), 10)
        assert raw.startswith(b"HTTP/1.1 408 ")


async def test_slow_body_gets_408(front: Open) -> None:
    async with front(timeouts=Timeouts(body_s=0.2)) as gateway:
        raw = await asyncio.wait_for(gateway.raw(post(GOOD)[:-5]), 10)
        assert raw.startswith(b"HTTP/1.1 408 ")


async def test_silent_connection_is_closed(front: Open) -> None:
    async with front(timeouts=Timeouts(keep_alive_s=0.2)) as gateway:
        assert await asyncio.wait_for(gateway.raw(b""), 10) == b""


async def test_pipelined_requests_get_one_answer_and_a_clean_close(front: Open) -> None:
    async with front() as gateway:
        raw = await asyncio.wait_for(gateway.raw(post(GOOD) * 3), 10)
        assert raw.count(b"HTTP/1.1 200 ") == 1
        assert sum(len(replica.requests) for replica in gateway.replicas) == 1
        await gateway.settled()


async def test_pipelining_behind_a_plain_page_is_answered_once_too(front: Open) -> None:
    async with front() as gateway:
        raw = await asyncio.wait_for(gateway.raw(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + post(GOOD)), 10)
        assert raw.count(b"HTTP/1.1 ") == 1
        assert not any(replica.requests for replica in gateway.replicas)


async def test_requests_one_after_another_share_a_connection(front: Open) -> None:
    async with front() as gateway:
        reader, writer = await gateway.connect()
        for _ in range(3):
            writer.write(post(GOOD))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["by"] in "ab"
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b'{"status":"ok"}')
        writer.close()


async def test_old_client_gets_an_answer_without_chunks(front: Open) -> None:
    async with front() as gateway:
        body = b'{"model":"m","stream":true}'
        raw = await gateway.raw(
            b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert b"transfer-encoding" not in raw
        assert raw.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_wish_to_upgrade_is_ignored_and_the_connection_lives_on(front: Open, upgrade: str) -> None:
    wish = f"connection: Upgrade, HTTP2-Settings\r\nupgrade: {upgrade}\r\n".encode()
    async with front() as gateway:
        reader, writer = await gateway.connect()
        for _ in range(2):
            writer.write(post(GOOD, head=wish))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            await reader.readexactly(
                int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            )
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n" + wish + b"\r\n")
            await reader.readuntil(b'{"status":"ok"}')
        writer.close()


async def test_expecting_client_is_told_to_continue(front: Open) -> None:
    async with front() as gateway:
        raw = await gateway.raw(post(GOOD, head=b"connection: close\r\nexpect: 100-continue\r\n"))
        assert raw.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


@pytest.mark.parametrize(
    "path",
    [
        "/collective_rpc", "/sleep", "/wake_up", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/reset_prefix_cache", "/start_profile", "/stop_profile", "/server_info", "/update_weights",
        "/pause", "/abort_requests", "/scale_elastic_ep", "/v1/chat/completions/../../../sleep", "//sleep",
        "/v1/chat/completions/render", "/invocations", "/v1/completions/",
    ],
)  # fmt: skip
async def test_control_endpoints_are_not_there(front: Open, face: str, path: str) -> None:
    async with front(face) as gateway:
        response = await gateway.post({"model": "m"}, path=path)
        assert response.status == 404
        assert not any(replica.requests for replica in gateway.replicas)


async def test_wrong_method_is_a_405(front: Open, face: str) -> None:
    async with front(face) as gateway:
        raw = await gateway.raw(b"GET /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 405 ")
        assert b"invalid_request_error" in raw


async def test_audio_form_is_routed_by_its_model_field(front: Open, face: str) -> None:
    form = (
        b'--q\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\x00\xff\r\n'
        b'--q\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--q--\r\n'
    )
    async with front(face) as gateway:
        for model, status in (
            (b"m", 502),
            (b"nope", 404),
        ):  # the scripted replica speaks only JSON and hangs up
            head = "connection: close\r\ncontent-type: multipart/form-data; boundary=q\r\n"
            response = await gateway.post(form % model, path="/v1/audio/transcriptions", headers=head)
            assert response.status == status
        await gateway.settled()
