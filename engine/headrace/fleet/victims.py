"""Which replicas of a pool go when there are too many. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.fleet.specs import ReplicaSpec
from headrace_router.types import ReplicaState


@dataclass(frozen=True, slots=True)
class Seen:
    """One replica of a pool as it is."""

    state: ReplicaState
    spec: ReplicaSpec  # what it runs as
    running: int | None = None  # requests; None: nobody could tell
    waiting: int | None = None
    backlog_tokens: int | None = None
    since_s: float = 0.0  # of the state, on any one clock
    can_be_recalled: bool = False  # it drains, and would still take requests


def victims(members: Mapping[int, Seen | None], template: ReplicaSpec, count: int) -> tuple[int, ...]:
    """The numbers of the `count` members to give up, the first to go first. None: not begun yet.

    Those that serve nobody yet go first, then those of an earlier specification than `template`'s, then the idle,
    then those with the least work, whose draining takes the least time; among equals the newest, whose cache holds the
    least.
    """
    order = sorted(members, key=lambda number: _rank(number, members[number], template))
    return tuple(order[: max(0, count)])


def _rank(number: int, seen: Seen | None, template: ReplicaSpec) -> tuple[float, ...]:
    if seen is None or seen.state is not ReplicaState.READY:
        started_s = 0.0 if seen is None else -seen.since_s
        return (0.0, 0.0, 0.0, 0.0, started_s, -number)
    is_current = is_of(template, seen.spec)
    known = seen.running is not None
    requests = (seen.running or 0) + (seen.waiting or 0)
    # One that does not tell its load may have any; it goes after those that say they have none.
    work = float(requests) if known else 0.5
    return (1.0, float(is_current), work, float(seen.backlog_tokens or 0), -seen.since_s, -number)


def is_of(template: ReplicaSpec, spec: ReplicaSpec) -> bool:
    """Whether a replica runs as its pool now asks, whatever its number, in this generation or a later one."""
    return spec.generation >= template.generation and (
        replace(spec, id=template.id, generation=template.generation) == template
    )
