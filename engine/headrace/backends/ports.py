"""Ports that replicas listen on: any that are free, or those of a range that firewalls let through."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import zmq

from headrace.errors import StartError

Bound = TypeVar("Bound")


class PortRange(NamedTuple):
    """Both ends belong to it."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """Of `20000-20999`. Raises ValueError for what is none."""
        first, dash, last = text.partition("-")
        found = cls(int(first), int(last))
        if not dash or not 1024 <= found.first <= found.last <= 65535:
            raise ValueError(text)
        return found

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def size(self) -> int:
        return self.last - self.first + 1


def bind(host: str, ports: PortRange | None = None, *, shares: bool = False) -> socket.socket:
    """A bound TCP socket that does not listen yet; what it accepts sends small answers at once (TCP_NODELAY). With
    `shares` ZMQ may bind beside it for as long as neither listens: the port is kept for it.

    Raises StartError when `host` is no address of this node or no port is free.
    """

    def at(port: int) -> socket.socket:
        bound = socket.socket(_family(host), socket.SOCK_STREAM)
        try:
            if shares:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it. asyncio would set it itself, but not on sockets of a listener made here (it
            # looks for an explicit protocol number): small answers then wait 40 ms for an acknowledgement.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound.bind((host, port))
        except OSError:
            bound.close()
            raise
        return bound

    return _first(at, host, ports)


def bind_zmq(zmq_socket: zmq.Socket[Any], host: str, ports: PortRange | None = None) -> str:
    """Bind it; returns the endpoint that others connect to. Raises StartError likewise."""
    where = f"[{host}]" if ":" in host else host
    zmq_socket.setsockopt(zmq.IPV6, int(":" in host))
    _first(lambda port: zmq_socket.bind(f"tcp://{where}:{port}"), host, ports)
    return zmq_socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _first(attempt: Callable[[int], Bound], host: str, ports: PortRange | None) -> Bound:
    """What the attempt gives at the first port that is free."""
    try:
        for port in (0,) if ports is None else _order(ports):
            try:
                if port:
                    # Who sets SO_REUSEADDR (ZMQ does) may bind where another keeps a port; this socket may not.
                    with socket.socket(_family(host), socket.SOCK_STREAM) as plain:
                        plain.bind((host, port))
                return attempt(port)
            except (OSError, zmq.ZMQError) as error:
                if not port or error.errno != errno.EADDRINUSE:
                    raise
    except (OSError, zmq.ZMQError) as error:
        raise StartError(
            f"cannot listen on {host}: {error.strerror}; is it an address of this node?"
        ) from error
    raise StartError(f"no port of {ports} is free on this node; make fleet.ports wider")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _order(ports: PortRange) -> Iterator[int]:
    """Every port once, from a place of this process's own: replicas that start at once shall not meet at each."""
    start = random.randrange(ports.size)
    for step in range(ports.size):
        yield ports.first + (start + step) % ports.size
