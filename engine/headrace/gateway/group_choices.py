"""Where one gateway process sends requests, told to the others that share its port, before load reports and KV events
can show it.

    router ── told ──> all of one turn of the loop ── datagrams for each of the others ──> their routers `heard`

Two things are told: how much work a replica got, and what it will soon have in its cache. Without the second, gateways
that know a prompt's beginning from each other only by KV events compute it in several places at once: with four of
them, and many short prompts, the first token took 25% longer (`headrace_bench.gateways_study`). What is known by text
alone no event ever tells.

Datagrams over UNIX sockets: nobody waits for anybody, and one that is lost because its reader is full or dead costs
what it would cost not to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import msgspec
import numpy as np

from headrace_router.load_table import Booking
from headrace_router.router import Router
from headrace_router.types import Request
from headrace_router.view import Decision

log = logging.getLogger(__name__)

MAX_DATAGRAM_BYTES = 128 * 1024
"""The kernel's own limit is 208 KiB by default."""
MAX_HASHES = 8192
"""Of one prompt: 128k tokens in blocks of 16. The rest is left to the KV events."""


class _Told(NamedTuple):
    """One choice on the wire."""

    replica: str
    boot: str
    model: str
    uncached_tokens: int
    blocks: dict[int, bytes] | None  # by block size: hashes, 8 bytes each, of the blocks that are news
    chunks: bytes | None  # hashes of text chunks

    @property
    def size_bytes(self) -> int:
        hashes = sum(map(len, (self.blocks or {}).values())) + len(self.chunks or b"")
        return 128 + len(self.replica) + len(self.model) + hashes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[_Told])


class GroupChoices:
    """Of one process. Belongs to its event loop: `start`, then `stop`, which is safe twice."""

    def __init__(self, router: Router, folder: Path, number: int, count: int) -> None:
        """`folder` holds the sockets of all `count` processes, by their numbers."""
        self._router = router
        self._own = folder / str(number)
        self._others = [str(folder / str(other)) for other in range(count) if other != number]
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._news: list[_Told] = []
        self.sent = 0  # datagrams
        self.lost = 0

    def start(self) -> None:
        """Tell and hear from now on."""
        self._own.unlink(missing_ok=True)  # a predecessor's
        heard = self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        heard.setblocking(False)
        heard.bind(str(self._own))
        self._loop.add_reader(heard.fileno(), self._hear)
        self._router.told = self._note

    def stop(self) -> None:
        self._router.told = None
        heard, self._socket = self._socket, None
        if heard is not None:
            self._loop.remove_reader(heard.fileno())
            heard.close()
            self._own.unlink(missing_ok=True)

    def _note(self, request: Request, decision: Decision, booking: Booking) -> None:
        if not self._news:
            self._loop.call_soon(self._tell)
        blocks = None
        if request.block_hashes is not None:
            # What the replica holds, or is expected to, the others know as well.
            hit = decision.hit_tokens
            blocks = {
                size: hashes[hit // size :][:MAX_HASHES].tobytes()
                for size, hashes in request.block_hashes.items()
            }
        chunks = None if request.chunk_hashes is None else request.chunk_hashes[:MAX_HASHES].tobytes()
        replica = booking.replica
        self._news.append(
            _Told(replica.id, replica.boot_id, request.model, booking.uncached_tokens, blocks, chunks)
        )

    def _tell(self) -> None:
        news, self._news = self._news, []
        part: list[_Told] = []
        size_bytes = 0
        for told in news:
            if part and size_bytes + told.size_bytes > MAX_DATAGRAM_BYTES:
                self._send(part)
                part, size_bytes = [], 0
            part.append(told)
            size_bytes += told.size_bytes
        self._send(part)

    def _send(self, part: list[_Told]) -> None:
        if self._socket is None:
            return
        datagram = _encoder.encode(part)
        for other in self._others:
            try:
                self._socket.sendto(datagram, other)
                self.sent += 1
            except OSError:  # full, or not there at the moment
                self.lost += 1

    def _hear(self) -> None:
        now_s = monotonic()
        with contextlib.suppress(BlockingIOError):
            while self._socket is not None:
                datagram = self._socket.recv(2 * MAX_DATAGRAM_BYTES)
                try:
                    for told in _decoder.decode(datagram):
                        self._take(told, now_s)
                except (msgspec.MsgspecError, ValueError) as error:
                    log.warning("unreadable choices of another gateway: %s", error)

    def _take(self, told: _Told, now_s: float) -> None:
        blocks = None
        if told.blocks is not None:
            blocks = {size: np.frombuffer(hashes, np.uint64) for size, hashes in told.blocks.items()}
        chunks = None if told.chunks is None else np.frombuffer(told.chunks, np.uint64)
        request = Request(told.model, block_hashes=blocks, chunk_hashes=chunks)
        self._router.heard(request, told.replica, told.boot, told.uncached_tokens, now_s)
