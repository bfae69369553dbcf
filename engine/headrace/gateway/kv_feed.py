"""KV events in: every replica's stream into the prefix index, a bounded piece of work at a time.

    replicas' ZMQ PUB ── live ────┐
    replicas' ROUTER ── replays ──┴─> KvStream ── EventBatch ──> index

Read straight from the loop's selector, as the load reports are. One socket per replica, since nothing in a message
says whose it is. What does not fit into one wake-up's time goes on in the next turn of the loop, so that a full
replay of many replicas never holds a request up for long.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

import zmq

from headrace.gateway.kv_stream import EventSink, KvFeedCounts, KvStream
from headrace_router.types import BootId, Membership, ReplicaId

log = logging.getLogger(__name__)

DRAIN_S = 0.002
"""Longest work before requests get their turn. One batch may take longer: 10,000 tokens in one message, 0.5 ms."""
MAX_REPLAYS = 4
"""At once; a replay may bring 30 MB."""


class KvFeed:
    """Of one gateway. One event loop owns it: `start`, `follow` as often as membership changes, `stop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: EventSink, drain_s: float = DRAIN_S) -> None:
        """`drain_s`: work after which others get their turn on the loop."""
        self._drain_s = drain_s
        self.counts = KvFeedCounts()
        self._loop = loop
        self._sink = sink
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zmq.set(zmq.MAX_SOCKETS, 8192)
        self._streams: dict[tuple[ReplicaId, BootId], KvStream] = {}
        self._readers: dict[zmq.Socket[bytes], int] = {}
        self._ready: list[KvStream] = []  # with something left to read, by turns
        self._scheduled = False

    @property
    def num_streams(self) -> int:
        """Replicas that are listened to."""
        return len(self._streams)

    @property
    def num_catching_up(self) -> int:
        """Replicas whose cache is not wholly known yet: a replay runs or waits for its turn."""
        return sum(stream.is_catching_up for stream in self._streams.values())

    def follow(self, membership: Membership) -> None:
        """Listen to exactly the replicas of this membership that tell of their caches.

        The index must know the membership first: it takes nothing from replicas that it does not know.
        """
        wanted = {
            (replica.id, replica.boot_id): replica
            for replica in membership.replicas
            if replica.endpoints.kv_events is not None
        }
        for key in self._streams.keys() - wanted.keys():
            self._streams.pop(key).close()
        for key in wanted.keys() - self._streams.keys():
            try:
                stream = KvStream(self._zmq, wanted[key], self._sink, self.counts, self._unwatch)
            except zmq.ZMQError as error:
                log.warning("no KV events of replica %s: %s", key[0], error)
                continue
            self._streams[key] = stream
            self._watch(stream.live, stream)
        self._begin_replays()

    def stop(self) -> None:
        """Close everything. Safe twice."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._ready.clear()
        self._zmq.term()

    def tick(self) -> None:
        """Called a few times a second: overdue replays, and messages whose announcement was missed."""
        now_s = monotonic()
        for stream in self._streams.values():
            stream.tick(now_s)
        self._begin_replays()
        self._ready = list(self._streams.values())
        self._drain()

    # --- readiness

    def _watch(self, socket: zmq.Socket[bytes], stream: KvStream) -> None:
        descriptor = self._readers[socket] = int(socket.fileno())
        self._loop.add_reader(descriptor, self._wake, stream)

    def _unwatch(self, socket: zmq.Socket[bytes]) -> None:
        descriptor = self._readers.pop(socket, None)
        if descriptor is not None:
            self._loop.remove_reader(descriptor)

    def _wake(self, stream: KvStream) -> None:
        """A descriptor is edge-triggered: once ready, a stream is read until it is empty."""
        if stream not in self._ready:
            self._ready.append(stream)
        if not self._scheduled:
            self._drain()

    def _drain(self) -> None:
        self._scheduled = False
        started_s = now_s = monotonic()
        while self._ready:
            stream = self._ready[0]
            replay = stream.replay
            if stream.key in self._streams and (stream.receive_replay(now_s) or stream.receive_live()):
                now_s = monotonic()
                if now_s - started_s >= self._drain_s:
                    self._ready.append(self._ready.pop(0))  # the next turn begins with another
                    self._scheduled = True
                    self._loop.call_soon(self._drain)
                    break
            elif replay is None or stream.replay is not None:
                self._ready.pop(0)
            # Else its replay has just ended: it stays, to be looked at once more for what came live.
        self.counts.drains += 1
        self._begin_replays()

    def _begin_replays(self) -> None:
        running = sum(stream.has_replay for stream in self._streams.values())
        for stream in self._streams.values():
            if running >= MAX_REPLAYS:
                return
            if stream.missing_from is not None and not stream.has_replay:
                try:
                    self._watch(stream.begin_replay(monotonic()), stream)
                except zmq.ZMQError as error:  # asked again by the next tick
                    log.warning("no replay from replica %s: %s", stream.key[0], error)
                    return
                running += 1
