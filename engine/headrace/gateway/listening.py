"""The socket that a gateway listens on."""

from __future__ import annotations

import errno
import socket

from headrace.errors import FatalStartError


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket that does not listen yet; `shared`: other sockets of this user may bind the same port.

    Raises FatalStartError when the address is taken or not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = "stop the program that holds the port or choose another with --port (0 takes a free one)"
        elif error.errno == errno.EACCES:
            advice = "ports below 1024 need root; choose another with --port"
        else:
            advice = "--host must be an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
        raise FatalStartError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; {advice}"
        ) from None
    return bound
