"""Whose request it is, and until when its client waits: what headers say of that. Pure."""

from __future__ import annotations

from math import isfinite

from headrace.gateway.http_request import RequestHead
from headrace.gateway.queue_measures import DEFAULT_TENANT

MOST_CHARACTERS = 64
SHORTEST_TIMEOUT_S, LONGEST_TIMEOUT_S = 0.001, 86_400.0


def tenant(head: RequestHead) -> str:
    """The name in the tenant header, cut; one for all where there is none."""
    given = head.tenant
    if not given:
        return DEFAULT_TENANT
    return given[:MOST_CHARACTERS].decode("latin-1").strip() or DEFAULT_TENANT


def timeout_s(head: RequestHead) -> float | None:
    """How long after sending it the client waits for a first byte; None where it did not say so sensibly."""
    given = [seconds for value in head.timeouts if (seconds := _seconds(value)) is not None]
    return min(given, default=None)


def _seconds(value: bytes) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if isfinite(seconds) and SHORTEST_TIMEOUT_S <= seconds <= LONGEST_TIMEOUT_S else None
