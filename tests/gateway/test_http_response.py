"""The hand-written response reader agrees with httptools, however the bytes are cut."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.http_response import ChunkedBody, MalformedResponse, parse_head


def chunked(parts: list[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts if part)
    return body + b"0\r\n" + trailer + b"\r\n"


class Reference:
    def __init__(self, data: bytes) -> None:
        self.body = b""
        self.complete = False
        self.parser = httptools.HttpResponseParser(self)
        self.parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


@given(
    parts=st.lists(st.binary(max_size=60), max_size=8),
    cuts=st.lists(st.integers(1, 30), max_size=60),
    extension=st.sampled_from([b"", b";name=value"]),
    trailer=st.sampled_from([b"", b"x-sum: 1\r\n"]),
)
def test_chunked_body_equals_httptools(
    parts: list[bytes], cuts: list[int], extension: bytes, trailer: bytes
) -> None:
    data = chunked(parts, extension, trailer)
    expected = Reference(data)
    assert expected.complete
    body = ChunkedBody()
    got, rest = b"", data
    for cut in [*cuts, len(data)]:
        if rest:
            assert not body.done
            got += body.feed(rest[:cut])
            rest = rest[cut:]
    assert got == expected.body
    assert body.done
    assert body.rest == b""


def test_bytes_behind_the_last_chunk_are_kept_apart() -> None:
    body = ChunkedBody()
    assert body.feed(b"3\r\nabc\r\n0\r\n\r\nHTTP/1.1 ") == b"abc"
    assert body.done
    assert body.rest == b"HTTP/1.1 "


@pytest.mark.parametrize("data", [b"zz\r\n", b"-3\r\nabc\r\n", b"x" * 5000])
def test_malformed_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedResponse):
        ChunkedBody().feed(data)


def test_head_keeps_what_is_the_clients_and_drops_the_connections_own() -> None:
    head = parse_head(
        b"HTTP/1.1 200 OK\r\nDate: now\r\nServer: uvicorn\r\nContent-Length: 12\r\nContent-Type: text/x\r\nX-A: b"
    )
    assert head == (200, b"Content-Type: text/x\r\nX-A: b\r\n", 12, False, True, False)


@pytest.mark.parametrize(
    ("head", "length", "chunked", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked", None, True, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked", None, True, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close", 5, False, False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5", 5, False, False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive", 5, False, True),
        (b"HTTP/1.1 200 OK", None, False, False),
        (b"HTTP/1.1 204 No Content", 0, False, True),
    ],
)
def test_framing_of_the_body(head: bytes, length: int | None, chunked: bool, keep_alive: bool) -> None:
    parsed = parse_head(head)
    assert (parsed.content_length, parsed.is_chunked, parsed.keep_alive) == (length, chunked, keep_alive)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/2 200",
        b"HTTP/1.1 abc",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\ncontent-length: x",
    ],
)
def test_malformed_heads_are_refused(head: bytes) -> None:
    with pytest.raises(MalformedResponse):
        parse_head(head)
