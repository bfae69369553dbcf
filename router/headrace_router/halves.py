"""Which replicas of a model may run which half of a request.

answers clients       unified and decode; prefill only where nothing else is left
runs the prompt for   unified and prefill, with a connector that some other replica
another               answering clients shares
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from headrace_router.load_columns import LoadColumns
from headrace_router.replica_load import ReplicaLoad
from headrace_router.types import Replica, ReplicaId, Role
from headrace_router.view import View

WIDE_FLEET = 40
"""Candidates from which on numpy decides quicker than a loop (`headrace_bench.decision_bench`)."""


class Halves:
    """The replicas of one model that may take new requests. The same objects while membership stays."""

    __slots__ = ("answering", "everyone", "prefilling")

    def __init__(self, everyone: Sequence[ReplicaLoad]) -> None:
        self.everyone = everyone
        self.answering = View(
            [load for load in everyone if load.replica.role is not Role.PREFILL] or everyone
        )
        self.prefilling = _prefilling(everyone, self.answering)  # None: nobody can hand over

    def attach(self) -> None:
        """Keep wide fleets as arrays too, from now on."""
        answering = self.answering
        if len(answering.loads) >= WIDE_FLEET:
            columns = answering.columns = LoadColumns(len(answering.loads))
            for row, load in enumerate(answering.loads):
                load.attach(columns, row)
            if self.prefilling is not None and self.prefilling.loads == answering.loads:
                self.prefilling.columns = columns

    def without(self, excluded: Set[ReplicaId]) -> Halves:
        """The same less some replicas, by loops alone: a retry is rare."""
        return Halves([load for load in self.everyone if load.replica.id not in excluded])


def can_pair(prefill: Replica, decode: Replica) -> bool:
    """Whether the first may compute a prompt for the second, as far as connectors go."""
    return (
        prefill.kv_connector is not None
        and prefill.kv_connector == decode.kv_connector
        and prefill.id != decode.id
    )


def _prefilling(everyone: Sequence[ReplicaLoad], answering: View) -> View | None:
    partners: Counter[str | None] = Counter(
        load.replica.kv_connector for load in answering.loads if load.replica.kv_connector is not None
    )
    if not partners:
        return None
    answers = {load.slot for load in answering.loads}
    able = [
        load
        for load in everyone
        if load.replica.role is not Role.DECODE
        # Of those that answer clients it takes two: nobody hands over to itself.
        and partners[load.replica.kv_connector] > (1 if load.slot in answers else 0)
    ]
    return View(able) if able else None
