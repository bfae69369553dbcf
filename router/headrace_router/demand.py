"""What a gateway tells of the work that comes, for whoever decides how many replicas there should be. Values only.

Counters only grow within one gateway's life, so that a report that is lost costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace_router.types import Role


class PoolDemand(NamedTuple):
    """What one gateway has seen of one pool, that is of one model in one role."""

    model: str
    role: Role
    held: int  # requests that wait in this gateway now
    arrived: int  # counter: requests that came, held and refused ones included
    arrived_work_s: float
    """Counter: replica-seconds of work that these bring, by the learned pace of the pool and the usual length of an
    answer. Of a model with both roles each pool counts its own half."""
    backlog_s: float | None  # mean over the pool's eligible replicas of the predicted wait; None without one


class Demand(NamedTuple):
    """One gateway's report."""

    gateway: str  # drawn anew with each gateway process
    sequence: int  # grows by one per report
    pools: tuple[PoolDemand, ...]
