"""What a gateway process and its supervisor say to each other, over a pair of UNIX sockets.

    supervisor ── Order, Members, Settings, Collect, Reply, Drain ──> gateway process
               <── Serving, Failed, Ask, Collected, Work ──

Frames: four bytes of length, big-endian, then msgpack. A line that ends means that the other side has ended.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, TypeVar

import msgspec

from headrace.gateway.merged_metrics import Family
from headrace_router.demand import Demand
from headrace_router.types import Membership

MAX_FRAME_BYTES = 256 * 1024 * 1024


class Settings(msgspec.Struct, tag=True, frozen=True):
    """What to go by from now on: `settings.GatewaySettings`."""

    version: int
    gateway: dict[str, Any]  # `config.Gateway`; its port is the one to share
    dead_after_s: float
    tokenizers: dict[str, tuple[str, dict[str, Any]]]
    weights: dict[str, float]  # of the configured tenants


class Order(msgspec.Struct, tag=True, frozen=True):
    """All that a gateway process needs to know. The first frame."""

    settings: Settings
    internal_token: str | None
    tells_demand: bool  # whether somebody wants to know of the work that comes
    number: int  # of this process, from 0
    count: int
    choices: str  # folder of the sockets on which processes tell each other where they send requests


class Members(msgspec.Struct, tag=True, frozen=True):
    """The fleet as it now is."""

    membership: Membership


class Collect(msgspec.Struct, tag=True, frozen=True):
    """Asks for what this process has measured, and for its last decisions."""

    number: int
    decisions: int  # how many of them


class Reply(msgspec.Struct, tag=True, frozen=True):
    """Answers an `Ask` with what all processes together have."""

    number: int
    metrics: bytes  # Prometheus's text
    decisions: list[dict[str, Any]]  # newest first


class Drain(msgspec.Struct, tag=True, frozen=True):
    """End: running requests may finish for so long. Another one may shorten it."""

    drain_s: float


class Serving(msgspec.Struct, tag=True, frozen=True):
    """This process accepts connections."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """It will not, and why."""

    reason: str


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Somebody has asked this process for the metrics, or the decisions, of all."""

    number: int
    decisions: int


class Collected(msgspec.Struct, tag=True, frozen=True):
    """Answers a `Collect`."""

    number: int
    families: list[Family]
    decisions: list[dict[str, Any]]


class Work(msgspec.Struct, tag=True, frozen=True):
    """What comes to this process, for whoever decides how many replicas there are."""

    demand: Demand


ToGateway = Order | Members | Settings | Collect | Reply | Drain
ToSupervisor = Serving | Failed | Ask | Collected | Work
Frame = TypeVar("Frame")


class Line:
    """One end. Sends never block: the other side always reads."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def open(cls, end: socket.socket) -> Line:
        """Takes `end` over."""
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, frame: ToGateway | ToSupervisor) -> None:
        """Nothing happens when the other side has gone."""
        if not self._writer.is_closing():
            data = self._encoder.encode(frame)
            self._writer.write(len(data).to_bytes(4, "big") + data)

    async def receive(self, decoder: msgspec.msgpack.Decoder[Frame]) -> Frame | None:
        """The next frame; None when the other side has gone. Raises ValueError on nonsense."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes")
            return decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def close(self) -> None:
        """Safe twice."""
        self._writer.close()
