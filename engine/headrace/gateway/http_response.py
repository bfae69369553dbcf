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
        meaning = _meanings.get(line)
        if meaning is None:
            meaning = _learn(line)
        if meaning == _KEEP:
            kept.append(line)
        elif meaning == _EVENT_STREAM:
            kept.append(line)
            is_event_stream = True
        elif meaning == _CHUNKED:
            is_chunked = True
        elif meaning == _CLOSE:
            keep_alive = False
        elif meaning == _KEEP_ALIVE:
            keep_alive = True
        elif meaning != _DROP:
            content_length = meaning
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


# What a header line means for the relay; a number is a content-length. A server repeats most of its lines in every
# answer, so their meanings are remembered.
_KEEP, _DROP, _EVENT_STREAM, _CHUNKED, _CLOSE, _KEEP_ALIVE = -1, -2, -3, -4, -5, -6
_MAX_MEANINGS = 1024
_meanings: dict[bytes, int] = {}


def _learn(line: bytes) -> int:
    meaning = _meaning(line)
    if len(_meanings) >= _MAX_MEANINGS:
        _meanings.clear()
    if len(line) < 200:
        _meanings[line] = meaning
    return meaning


def _meaning(line: bytes) -> int:
    colon = line.find(b":")
    if colon <= 0:
        raise MalformedResponse(f"not a header line: {line[:60]!r}")
    name = line[:colon].lower()
    value = line[colon + 1 :].strip().lower()
    if name == b"content-length":
        if not value.isdigit():
            raise MalformedResponse(f"content-length is {value[:60]!r}")
        return int(value)
    if name == b"transfer-encoding":
        return _CHUNKED if value.endswith(b"chunked") else _DROP
    if name == b"connection":
        return _CLOSE if b"close" in value else _KEEP_ALIVE if b"keep-alive" in value else _DROP
    if name == b"content-type" and value.startswith(b"text/event-stream"):
        return _EVENT_STREAM
    return _DROP if name in _DROPPED else _KEEP


_HEX = re.compile(rb"[0-9A-Fa-f]{1,16}")  # int() alone would take "-3" and "1_0"
_SIZE_LINE = -1  # a chunk's size comes next
_TRAILERS = -2  # the last chunk has come


def chunk_start(data: bytes) -> int:
    """Where the payload begins when `data` is exactly one chunk with its framing; 0 when it is anything else."""
    end = data.find(b"\r\n", 0, 20)
    if end <= 0:
        return 0
    try:
        return end + 2 if int(data[:end], 16) == len(data) - end - 4 > 0 else 0
    except ValueError:
        return 0


class ChunkedBody:
    """Takes the chunk framing off a body, piece by piece, however the network cut it."""

    __slots__ = ("_in_chunk", "_line", "done", "rest")

    def __init__(self) -> None:
        self._in_chunk = _SIZE_LINE  # bytes of the current chunk still to come, its CRLF included
        self._line = b""  # an incomplete size line
        self.done = False
        self.rest = b""  # what came behind the last chunk

    @property
    def between(self) -> bool:
        """Whether the next byte begins a chunk."""
        return self._in_chunk == _SIZE_LINE and not self._line

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Sets `done` at the end of the body. Raises MalformedResponse."""
        if self.between:
            start = chunk_start(data)
            if start:
                return data[start:-2]
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
