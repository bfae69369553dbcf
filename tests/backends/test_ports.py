"""Ports of a range, each for one."""

import socket
from collections.abc import Iterator

import pytest
import zmq

from headrace.backends import ports
from headrace.backends.ports import PortRange
from headrace.errors import StartError

HOST = "127.0.0.1"


@pytest.fixture
def free() -> PortRange:
    """Of two ports side by side that nobody has."""
    while True:
        with ports.bind(HOST) as first:
            port = first.getsockname()[1]
            try:
                ports.bind(HOST, PortRange(port + 1, port + 1)).close()
            except StartError:
                continue
        return PortRange(port, port + 1)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_each_port_of_a_range_is_given_once(free: PortRange) -> None:
    with ports.bind(HOST, free) as one, ports.bind(HOST, free) as other:
        assert {one.getsockname()[1], other.getsockname()[1]} == {free.first, free.last}
        with pytest.raises(
            StartError, match=f"no port of {free} is free on this node; make fleet.ports wider"
        ):
            ports.bind(HOST, free)


def test_a_port_that_is_kept_is_nobody_elses(
    free: PortRange, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    with ports.bind(HOST, free, shares=True) as kept:
        endpoint = ports.bind_zmq(context.socket(zmq.PUB), HOST, free)
        port = kept.getsockname()[1]
        assert endpoint != f"tcp://{HOST}:{port}"
        # Who it is kept for binds beside it.
        context.socket(zmq.PUB).bind(f"tcp://*:{port}")


def test_a_foreign_address_is_refused(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    told = "cannot listen on 203.0.113.1: .*; is it an address of this node?"
    with pytest.raises(StartError, match=told):
        ports.bind("203.0.113.1", PortRange(20000, 20010))
    with pytest.raises(StartError, match=told):
        ports.bind_zmq(context.socket(zmq.PUB), "203.0.113.1")


def test_answers_leave_at_once() -> None:
    with ports.bind(HOST) as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "text", ["", "20000", "20000-", "30000-20000", "80-90", "60000-70000", "a-b", "-1-2"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        PortRange.parse(text)


def test_a_range_is_written_as_it_is_read() -> None:
    assert str(PortRange.parse("20000-20999")) == "20000-20999"
    assert PortRange.parse("20000-20999").size == 1000
