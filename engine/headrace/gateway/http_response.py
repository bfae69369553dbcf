"""Reading a replica's HTTP/1.1 response: the head once, then the body without looking into it.

Written by hand, for speed alone (`headrace_bench.relay` measures it; httptools costs a Python call per header and two
per message, which was a third of a request). It reads what HTTP/1.1 servers send; `tests/gateway/test_http_response.py`
compares it with httptools on arbitrary splits.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# No engine sends a larger head; without a bound a broken server could fill our memory with headers.
MAX_HEAD_BYTES = 256 * 1024
_MAX_CHUNK_LINE_BYTES = 4096

# Never forwarded: they describe one connection (RFC 9110, 7.6.1), or are written anew by us.
_DROPPED = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate te trailer transfer-encoding upgrade content-length "
    b"server date x-request-id".split()
)


class MalformedResponse(Exception):
    """The replica does not speak HTTP/1.1."""


class ResponseHead(NamedTuple):
    """Status, header lines to forward (each ended by CRLF), and how the body is framed."""

    status: int
    fields: bytes
    content_length: int | None  # None: chunked, or until the connection ends
    is_chunked: bool
    keep_alive: bool
    is_event_stream: bool


def parse_head(head: bytes) -> ResponseHead:
    """Parse a head without its final empty line. Raises MalformedResponse."""
    first, _, rest = head.partition(b"\r\n")
    if not first.startswith(b"HTTP/1.") or not first[9:12].isdigit():
        raise MalformedResponse(f"not an HTTP/1 response: {first[:60]!r}")
    keep_alive = first[7:8] == b"1"
    content_length: int | None = None
    is_chunked = is_event_stream = False
    kept: list[bytes] = []
    for line in rest.split(b"\r\n") if rest else ():
        colon = line.find(b":")
        if colon <= 0:
            raise MalformedResponse(f"not a header line: {line[:60]!r}")
        name = line[:colon].lower()
        if name not in _DROPPED:
            kept.append(line)
            if name == b"content-type":
                is_event_stream = line[colon + 1 :].lstrip().startswith(b"text/event-stream")
        elif name == b"content-length":
            value = line[colon + 1 :].strip()
            if not value.isdigit():
                raise MalformedResponse(f"content-length is {value[:60]!r}")
            content_length = int(value)
        elif name == b"transfer-encoding":
            is_chunked = line[colon + 1 :].strip().lower().endswith(b"chunked")
        elif name == b"connection":
            options = line[colon + 1 :].lower()
            keep_alive = b"keep-alive" in options or (keep_alive and b"close" not in options)
    kept.append(b"")
    status = int(first[9:12])
    if status in (204, 304):
        content_length, is_chunked = 0, False
    return ResponseHead(
        status,
        b"\r\n".join(kept),
        None if is_chunked else content_length,
        is_chunked,
        keep_alive and (is_chunked or content_length is not None),
        is_event_stream,
    )


_HEX = re.compile(rb"[0-9A-Fa-f]{1,16}")  # int() alone would take "-3" and "1_0"
_SIZE_LINE = -1  # a chunk's size comes next
_TRAILERS = -2  # the last chunk has come


class ChunkedBody:
    """Takes the chunk framing off a body, piece by piece, however the network cut it."""

    __slots__ = ("_in_chunk", "_line", "done", "rest")

    def __init__(self) -> None:
        self._in_chunk = _SIZE_LINE  # bytes of the current chunk still to come, its CRLF included
        self._line = b""  # an incomplete size line
        self.done = False
        self.rest = b""  # what came behind the last chunk

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Sets `done` at the end of the body. Raises MalformedResponse."""
        if self._in_chunk == _SIZE_LINE and not self._line:
            # The usual read holds exactly one chunk: a server writes an event at a time.
            end = data.find(b"\r\n", 0, 20)
            if end > 0:
                try:
                    size = int(data[:end], 16)
                except ValueError:
                    size = 0
                if size > 0 and len(data) == end + size + 4:
                    return data[end + 2 : -2]
        return self._feed_pieces(data)

    def _feed_pieces(self, data: bytes) -> bytes:
        payload: list[bytes] = []
        position = 0
        while position < len(data):
            if self._in_chunk > 0:
                take = min(self._in_chunk, len(data) - position)
                # The last two bytes of a chunk are its CRLF.
                payload_end = position + min(take, max(0, self._in_chunk - 2))
                payload.append(data[position:payload_end])
                self._in_chunk -= take
                position += take
                if self._in_chunk == 0:
                    self._in_chunk = _SIZE_LINE
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                if len(self._line) > _MAX_CHUNK_LINE_BYTES:
                    raise MalformedResponse("a chunk's size line does not end")
                break
            line = (self._line + data[position : end + 1]).strip()
            self._line = b""
            position = end + 1
            if self._in_chunk == _TRAILERS:  # up to an empty line
                if not line:
                    self.done = True
                    self.rest = data[position:]
                    break
                continue
            digits = line.partition(b";")[0].strip()
            if not _HEX.fullmatch(digits):
                raise MalformedResponse(f"not a chunk size: {line[:60]!r}")
            size = int(digits, 16)
            self._in_chunk = size + 2 if size > 0 else _TRAILERS
        return payload[0] if len(payload) == 1 else b"".join(payload)
