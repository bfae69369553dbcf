"""HTTP/1.1 as the benchmark's clients speak it: just enough, at little cost.

They read answers of the mock backend only, so they may find an answer's end by its length or by the last chunk
of its framing instead of parsing it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any
from urllib.parse import urlsplit

FRAMING_END = b"\r\n0\r\n\r\n"
CHAT = b"/v1/chat/completions"


def address(url: str) -> tuple[str, int]:
    """Host and port of a URL; raises ValueError where one is missing."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{url!r} has no host or no port")
    return parts.hostname, parts.port


def post(body: bytes, path: bytes = CHAT) -> bytes:
    """One whole HTTP request."""
    return (
        b"POST %b HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (
            path,
            len(body),
            body,
        )
    )


class AnswerScanner:
    """Finds the end of each answer on a connection, and that its status is 200."""

    __slots__ = ("_chunked", "_head", "_remaining", "_tail", "in_answer")

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.in_answer = False
        self._head = b""
        self._remaining = 0
        self._chunked = False
        self._tail = b""

    def feed(self, data: bytes) -> bool:
        """True when `data` ends an answer. Raises ValueError: a status other than 200, bytes past the end."""
        if not self.in_answer:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return False
            data = self._begin(end)
        if self._chunked:
            self._tail = (self._tail + data)[-len(FRAMING_END) :]
            done = self._tail == FRAMING_END
        else:
            self._remaining -= len(data)
            if self._remaining < 0:
                raise ValueError(f"{-self._remaining} bytes after the end of an answer")
            done = self._remaining == 0
        if done:
            self._reset()
        return done

    def _begin(self, end: int) -> bytes:
        head, rest = self._head[:end].lower(), self._head[end + 4 :]
        if head[9:12] != b"200":
            raise ValueError(f"status {head[9:12].decode(errors='replace')}: {rest[:200]!r}")
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            self._remaining = int(head[at + 17 :].split(b"\r\n", 1)[0])
        else:
            self._chunked = True
            rest = b"\r\n" + rest  # so that an empty body ends in FRAMING_END too
        self.in_answer = True
        return rest


async def get_json(url: str, path: str) -> dict[str, Any]:
    """GET a small JSON document over a connection of its own."""
    reader, writer = await asyncio.open_connection(*address(url))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n".encode())
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    document: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return document


def raw_connection(url: str, receive_buffer_bytes: int | None = None) -> socket.socket:
    """A plain non-blocking socket, for clients that misbehave. A small buffer must be set first."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.connect(address(url))
    sock.setblocking(False)
    return sock
