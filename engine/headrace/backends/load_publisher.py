"""Load reports on the wire: a ZMQ PUB socket, one msgpack map per message, one frame.

    publish(report) ──> newest report + iterations and transfers since the last send ──> PUB

at most every 5 ms, and a heartbeat with the same gauges after `interval_s` of silence.

Every backend that hosts an engine owns one publisher; the gateway's feed decodes with `decode_report`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

import msgspec
import zmq

from headrace.backends import ports
from headrace.backends.ports import PortRange
from headrace.errors import StartError
from headrace_router.types import Iteration, LoadReport, Transfer

MIN_GAP_S = 0.005
"""Shortest time between two sends. An engine step takes longer, so a burst costs readers one message."""

MAX_ITERATIONS = 64
"""Most iterations, and most transfers, that one report carries; the oldest fall out first."""

LINGER_MS = 50
"""How long closing may wait for the last message to leave; a reader that has gone must not hold up a stop."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LoadReport)


def decode_report(message: bytes) -> LoadReport:
    """The report in one message of a `LoadPublisher`. Raises ValueError when it is not one."""
    try:
        return _decoder.decode(message)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a load report ({len(message)} bytes): {error}") from error


class LoadPublisher:
    """Sends the newest report on change and at least every `interval_s`. Belongs to one event loop."""

    def __init__(self, host: str, interval_s: float, port_range: PortRange | None = None) -> None:
        """`host` is the address readers connect to: an IP of this node, never a wildcard."""
        self._host = host
        self._ports = port_range
        self._interval_s = interval_s
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._endpoint = ""
        self._newest: LoadReport | None = None
        self._iterations: deque[Iteration] = deque(maxlen=MAX_ITERATIONS)
        self._transfers: deque[Transfer] = deque(maxlen=MAX_ITERATIONS)
        self._sequence = 0
        self._last_send_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._changed = False

    @property
    def newest(self) -> LoadReport | None:
        """The newest report given to `publish`, with the sequence of the last send. None before the first."""
        return self._newest

    def start(self) -> str:
        """Bind a free port and return `tcp://host:port`. Again: the same endpoint. Call from the event loop.

        Raises StartError when `host` is not an address of this node.
        """
        if self._socket is None:
            # A context of its own: closing it cannot wait on, or break, sockets of vLLM in the same process.
            self._context = zmq.Context(1)
            self._socket = self._context.socket(zmq.PUB)
            try:
                self._endpoint = ports.bind_zmq(self._socket, self._host, self._ports)
            except StartError:
                self._close()
                raise
            if self._newest is not None:
                self._send_after(0.0)
        return self._endpoint

    def publish(self, report: LoadReport) -> None:
        """Send `report` soon; of several within 5 ms the newest wins and their iterations and transfers are joined.

        Its `sequence` is replaced by the publisher's own. Call from the event loop; never blocks. Before
        `start` and after `stop` it only remembers the report.
        """
        self._newest = report
        self._iterations.extend(report.iterations)
        self._transfers.extend(report.transfers)
        if self._socket is None or self._changed:
            return
        self._changed = True
        loop = asyncio.get_running_loop()
        self._send_after(max(0.0, self._last_send_s + MIN_GAP_S - loop.time()))

    async def stop(self) -> None:
        """Send what is pending, close the socket, release the port. Safe twice and before `start`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._changed:
            self._send()
        self._close()

    def _send_after(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._send_and_rearm)

    def _send_and_rearm(self) -> None:
        self._timer = None
        self._send()
        self._send_after(self._interval_s)

    def _send(self) -> None:
        if self._socket is None or self._newest is None:
            return
        self._sequence += 1
        self._newest = replace(
            self._newest,
            sequence=self._sequence,
            iterations=tuple(self._iterations),
            transfers=tuple(self._transfers),
        )
        self._iterations.clear()
        self._transfers.clear()
        self._changed = False
        self._last_send_s = asyncio.get_running_loop().time()
        # PUB never blocks: past a slow reader's high-water mark it drops, and the next heartbeat catches up.
        self._socket.send(_encoder.encode(self._newest), zmq.NOBLOCK)
        self._newest = replace(self._newest, iterations=(), transfers=())

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=LINGER_MS)
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None
