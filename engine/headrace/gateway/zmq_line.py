"""ZMQ subscriptions over a network that may be cut."""

from __future__ import annotations

from typing import Any

import zmq

_PING_MS = 3000
_ANSWER_MS = 5000
_CONNECT_MS = 2000


def keep_alive(line: zmq.Socket[Any]) -> None:
    """Before it connects. A connection that falls silent is made anew after 3 to 8 s, and tried every 2 s while the
    other side is not reached. Left to itself TCP waits the longer for its next try the longer a cut has lasted, and a
    publisher that is healthy again stays unheard for as long."""
    line.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
    line.setsockopt(zmq.HEARTBEAT_TIMEOUT, _ANSWER_MS)
    line.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
    line.setsockopt(zmq.RECONNECT_IVL, 50)
    line.setsockopt(zmq.LINGER, 0)
