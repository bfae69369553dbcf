"""KV events over ZMQ, as vLLM's ZmqEventPublisher sends them, with its replay socket."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import zmq
import zmq.asyncio

from headrace.backends import ports
from headrace.backends.kv_event_wire import (
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    encode_batch,
)
from headrace.backends.ports import PortRange

BUFFERED_BATCHES = 10_000
"""Batches kept for replay, vLLM's default."""

HIGH_WATER_MARK = 100_000
"""Messages queued per subscriber before ZMQ drops, vLLM's default."""

_TOPIC = b""


class KvEventPublisher:
    """A PUB socket for batches and a ROUTER socket that replays them. Belongs to one event loop."""

    def __init__(self, host: str, port_range: PortRange | None = None) -> None:
        """`host` is the address subscribers connect to: an address of this node, never a wildcard."""
        self._host = host
        self._ports = port_range
        self._context = zmq.asyncio.Context(1)
        self._publish: zmq.Socket[bytes] | None = None
        self._replay: zmq.asyncio.Socket | None = None
        self._replaying: asyncio.Task[None] | None = None
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=BUFFERED_BATCHES)
        self._next_sequence = 0

    def start(self) -> tuple[str, str]:
        """Bind both sockets to free ports; returns the endpoints of events and of replay. Raises StartError."""
        self._publish = zmq.Socket(self._context, zmq.PUB)
        self._publish.set_hwm(HIGH_WATER_MARK)
        events = ports.bind_zmq(self._publish, self._host, self._ports)
        self._replay = self._context.socket(zmq.ROUTER)
        replay = ports.bind_zmq(self._replay, self._host, self._ports)
        self._replaying = asyncio.get_running_loop().create_task(self._serve_replays(self._replay))
        return events, replay

    def publish(self, events: Sequence[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        """Send one batch under the next sequence number. Never blocks; nothing is sent for no events."""
        if not events or self._publish is None:
            return
        payload = encode_batch(KVEventBatch(time.time(), list(events), data_parallel_rank=0))
        sequence = self._next_sequence.to_bytes(SEQUENCE_BYTES, "big")
        self._next_sequence += 1
        self._buffer.append((sequence, payload))
        self._publish.send_multipart((_TOPIC, sequence, payload), zmq.NOBLOCK)

    async def stop(self) -> None:
        """Close both sockets and release the ports. Safe twice and before `start`."""
        if self._replaying is not None:
            self._replaying.cancel()
            await asyncio.gather(self._replaying, return_exceptions=True)
            self._replaying = None
        for socket in (self._publish, self._replay):
            if socket is not None:
                socket.close(linger=0)
        self._publish = self._replay = None
        self._context.term()

    async def _serve_replays(self, replay: zmq.asyncio.Socket) -> None:
        while True:
            frames = await replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != SEQUENCE_BYTES:
                continue  # not a replay request; vLLM ignores it as well
            client, _empty, start = frames
            # Big-endian bytes of equal length compare as the numbers do. A copy, since publishing goes on
            # meanwhile.
            for sequence, payload in [entry for entry in self._buffer if entry[0] >= start]:
                await replay.send_multipart((client, b"", _TOPIC, sequence, payload))
            await replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))
