"""Who a fleet belongs to: the process that has brought it up, and which takes it along when it ends, however it ends.

On a cluster of our own everything ends with that process anyway. On somebody else's the actors are detached, and Ray
leaves them; without this a killed `headrace serve` would hold its GPUs for ever.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from headrace.config import Gateway

log = logging.getLogger(__name__)

_LOOK_S = 3.0


@dataclass(frozen=True, slots=True)
class Owner:
    """The process, as it was when it started the fleet."""

    gateway: Gateway  # where its own gateway listens, and gateways on other nodes too
    node_id: str | None = None  # where it runs; that node needs no other gateway
    job_id: str | None = None  # Ray's, of its connection; None: the fleet does not end with it


def connected(gateway: Gateway, *, is_local: bool) -> Owner:
    """This process."""
    import ray

    context = ray.get_runtime_context()
    return Owner(gateway, context.get_node_id(), None if is_local else context.get_job_id())


async def until_gone(job_id: str) -> None:
    """Return once Ray knows that the process of this job has ended, or its node."""
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            if await asyncio.to_thread(_is_over, job_id):
                return
        except (
            Exception
        ) as error:  # supervision boundary: Ray's head is away; then nobody has been seen to go
            log.warning("cannot ask Ray about job %s: %s", job_id, error)


def _is_over(job_id: str) -> bool:
    from ray._private.state import jobs

    return any(job["JobID"] == job_id and job["IsDead"] for job in jobs())
