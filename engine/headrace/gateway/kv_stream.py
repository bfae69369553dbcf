"""One replica's KV events: a subscription, and a replay whenever something is missing.

A replay is asked for at the start (the engine may have filled its cache long ago), at every gap, and once when the
engine falls silent (a lost last message leaves no gap). While it runs, live messages wait, so that the index sees them
in order. vLLM keeps its last 10,000 batches and answers between two batches of its own, at most 0.1 s late; its socket
drops what a slow reader lets pile up, so a replay that ends with a gap is asked for again. What the engine no longer
keeps is given up: the index forgets the replica and fills from what follows.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import zmq

from headrace.backends.kv_event_wire import END_OF_REPLAY, SEQUENCE_BYTES
from headrace.gateway.kv_event_reader import KvEventReader
from headrace.gateway.zmq_line import keep_alive
from headrace_router.events import EventBatch
from headrace_router.types import BootId, Replica, ReplicaId

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 3.0
"""Without a message, a replay is asked for again."""
QUIET_S = 1.0
"""After this long without a message, what may have been lost last is asked for: no later message would show it. It
also closes the moment between the first replay and the subscription, which takes effect whenever it does."""
MAX_ATTEMPTS = 4
MAX_WAITING = 10_000
"""Live messages kept during a replay; beyond, they are dropped and leave a gap for the next one."""

Frames = list[bytes]


class EventSink(Protocol):
    """The prefix index, as far as it concerns events."""

    def apply(self, batch: EventBatch) -> int | None:
        """Take in a batch in any order; returns the first sequence number that is missing, None without a gap."""
        ...

    def gap(self, replica_id: ReplicaId) -> tuple[int, int] | None:
        """The sequence numbers that are missing: first and end, not included."""
        ...

    def give_up_gap(self, replica_id: ReplicaId, boot_id: BootId) -> None:
        """What is missing will not come: forget the replica's blocks and go on behind the gap."""
        ...


@dataclass(slots=True)
class KvFeedCounts:
    """Since the start; for metrics."""

    messages: int = 0  # live ones
    events: int = 0
    unreadable: int = 0
    gaps: int = 0  # replays asked for because something was missing
    replays: int = 0  # all replays asked for
    replayed: int = 0  # batches that replays brought
    given_up: int = 0  # gaps that no replay could close
    lag_s: float = 0.0  # age of the newest live batch when it was read
    drains: int = 0  # turns taken on the event loop


class KvStream:
    """Sockets of one replica's boot. Nothing blocks; the feed calls."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        replica: Replica,
        sink: EventSink,
        counts: KvFeedCounts,
        before_close: Callable[[zmq.Socket[bytes]], None],
    ) -> None:
        """`before_close` is told each socket while its descriptor still is its own: libuv ends the whole process
        when it finds one closed that it was to watch."""
        assert replica.endpoints.kv_events is not None
        self._before_close = before_close
        self.key: tuple[ReplicaId, BootId] = (replica.id, replica.boot_id)
        self._context = context
        self._sink = sink
        self._counts = counts
        self._reader = KvEventReader(*self.key)
        self._replay_endpoint = replica.endpoints.kv_replay
        self.live: zmq.Socket[bytes] = context.socket(zmq.SUB)
        self.live.setsockopt(zmq.SUBSCRIBE, b"")
        self.live.setsockopt(zmq.RCVHWM, 100_000)
        keep_alive(self.live)
        self.live.connect(replica.endpoints.kv_events)
        self.replay: zmq.Socket[bytes] | None = None
        self.missing_from: int | None = 0 if self._replay_endpoint else None
        """Where a replay should begin, None when none is needed. The feed says when: `begin_replay`."""
        self._waiting: deque[Frames] = deque()
        self._attempts = 0
        self._asked_from = 0
        self._forgives_gap = False
        self._due: int | None = None  # the next that a replay should bring, None before its first
        self._deadline_s = 0.0
        self._next = 0  # sequence number after the highest that came
        self._heard = True  # something since the last tick
        self._quiet_since_s: float | None = None  # None: not heard of since the last check

    @property
    def has_replay(self) -> bool:
        """Whether a replay is under way."""
        return self.replay is not None

    @property
    def is_catching_up(self) -> bool:
        """Whether more is known to have been sent than the index has been told."""
        return self.replay is not None or self.missing_from is not None or bool(self._waiting)

    def close(self) -> None:
        """Both sockets. Safe twice."""
        self._before_close(self.live)
        self.live.close(0)
        self._end_replay_socket()

    # --- live

    def receive_live(self) -> bool:
        """Take one message in, those that waited for a replay first. False when there is none."""
        catching_up = self.replay is not None or self.missing_from is not None
        if self._waiting and not catching_up:
            self._apply_live(self._waiting.popleft())
            return True
        try:
            frames = self.live.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._counts.messages += 1
        self._heard = True
        if not catching_up:
            self._apply_live(frames)
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append(frames)
        return True

    def _apply_live(self, frames: Frames) -> None:
        gap = self._apply(frames, live=True)
        if gap is None or self.missing_from is not None:
            return
        self._counts.gaps += 1
        if self._replay_endpoint is None or self._forgives_gap:
            self._forgives_gap = False
            self._give_up()
        else:
            self.missing_from = gap
            self._attempts = 0

    def _apply(self, frames: Frames, *, live: bool) -> int | None:
        if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES:
            self._counts.unreadable += 1
            return None
        sequence = int.from_bytes(frames[1], "big")
        self._next = max(self._next, sequence + 1)
        try:
            batch, made_s = self._reader.read(sequence, frames[2])
        except (ValueError, OverflowError, TypeError) as error:
            self._counts.unreadable += 1
            log.warning("replica %s: unreadable KV events: %s", self.key[0], error)
            # Its place must be filled, or everything after it would wait for a replay of the same bytes.
            batch, made_s = EventBatch(*self.key, sequence, ()), 0.0
        self._counts.events += len(batch.events)
        if live and made_s:
            self._counts.lag_s = max(time.time() - made_s, 0.0)
        return self._sink.apply(batch)

    # --- replay

    def begin_replay(self, now_s: float) -> zmq.Socket[bytes]:
        """Ask for everything from `missing_from` on. A socket of its own, so that no late answer is taken for it."""
        assert self._replay_endpoint is not None and self.missing_from is not None
        self._end_replay_socket()
        replay: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        replay.setsockopt(zmq.LINGER, 0)
        replay.setsockopt(zmq.RCVHWM, 0)  # what we do not take at once, the engine's socket would drop
        replay.connect(self._replay_endpoint)
        replay.send_multipart((b"", self.missing_from.to_bytes(SEQUENCE_BYTES, "big")), zmq.NOBLOCK)
        self.replay = replay
        self._asked_from, self.missing_from = self.missing_from, None
        self._due = None
        self._attempts += 1
        self._counts.replays += 1
        self._deadline_s = now_s + REPLAY_TIMEOUT_S
        return replay

    def receive_replay(self, now_s: float) -> bool:
        """Take one replayed message in. False when there is none, or the replay is over."""
        if self.replay is None:
            return False
        try:
            frames = self.replay.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._deadline_s = now_s + REPLAY_TIMEOUT_S
        if len(frames) != 4:
            self._counts.unreadable += 1
            return True
        if frames[2] == END_OF_REPLAY:
            self._end_replay()
            return False
        sequence = int.from_bytes(frames[2], "big")
        due, self._due = self._due, sequence + 1
        if due is not None and sequence > due:
            # The engine's socket drops what we do not take in time. Asked again from there at once: of what comes
            # behind a gap only so much may wait before the index gives the replica up.
            self._end_replay_socket()
            self.missing_from, self._attempts = due, 0
            return False
        self._counts.replayed += 1
        gap = self._apply(frames[1:], live=False)
        if due is None and gap is not None and sequence > self._asked_from:
            self._give_up()  # the engine's buffer begins here: what came before is gone
        return True

    def tick(self, now_s: float) -> None:
        """A replay that brings nothing for too long is over, and begun again if it may; silence is asked about once."""
        if self.replay is not None and now_s > self._deadline_s:
            self._end_replay(timed_out=True)
        if self._heard:
            self._heard = False
            self._quiet_since_s = now_s
        elif self._was_quiet(now_s) and not self.is_catching_up and self._replay_endpoint is not None:
            self._quiet_since_s = None
            self.missing_from = self._next

    def _was_quiet(self, now_s: float) -> bool:
        return self._quiet_since_s is not None and now_s - self._quiet_since_s > QUIET_S

    def _end_replay(self, *, timed_out: bool = False) -> None:
        self._end_replay_socket()
        missing = self._sink.gap(self.key[0])
        gap = missing[0] if missing is not None else self._asked_from if timed_out else None
        if gap is not None and gap > self._asked_from:
            self._attempts = 1  # it got on
        if gap is not None and self._attempts < MAX_ATTEMPTS:
            self.missing_from = gap
            return
        if missing is not None:
            self._give_up()
        elif gap is not None:
            self._forgives_gap = True  # nobody answers: the next live message begins anew
        self._attempts = 0

    def _give_up(self) -> None:
        self._counts.given_up += 1
        self._sink.give_up_gap(*self.key)

    def _end_replay_socket(self) -> None:
        replay, self.replay = self.replay, None
        if replay is not None:
            self._before_close(replay)
            replay.close(0)
