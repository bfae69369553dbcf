"""What a policy sees: the candidates, their loads, and how much of the prompt each already holds.

A view belongs to one call of `Policy.choose`: the router uses it again for the next request. Whoever wants to keep
something of it keeps the `Decision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace_router.load_columns import LoadColumns
from headrace_router.replica_load import ReplicaLoad
from headrace_router.types import Request


class Hits(NamedTuple):
    """Leading tokens of the prompt that replicas hold, by `ReplicaLoad.slot`, those of a CPU tier included; at most the
    prompt less one, which is computed in any case."""

    tokens: NDArray[np.int32]
    slow_tokens: NDArray[np.int32] | None = None  # of those, in the CPU tier: to be loaded, not computed
    source: str = "tokens"  # or "text"


class View:
    """Candidates at the moment of one decision. Policies read; only the router writes."""

    __slots__ = ("columns", "hits", "loads", "now_s", "slots")

    def __init__(
        self,
        loads: Sequence[ReplicaLoad],
        columns: LoadColumns | None = None,
        hits: Hits | None = None,
        now_s: float = 0.0,
    ) -> None:
        self.loads = loads  # at least one; the same object while membership stays
        self.columns = columns  # the same loads as arrays, where the fleet is large; else None
        self.hits = hits  # None: nothing is known of the prompt, load decides
        self.now_s = now_s
        self.slots: NDArray[np.intp] | slice | None = None  # of `loads`, made when first needed

    def candidate_slots(self) -> NDArray[np.intp] | slice:
        """What picks each of `loads` out of an array by slot."""
        slots = self.slots
        if slots is None:
            numbers = [load.slot for load in self.loads]
            first = numbers[0]
            if numbers == list(range(first, first + len(numbers))):
                slots = slice(first, first + len(numbers))  # the usual case: no copy
            else:
                slots = np.array(numbers, np.intp)
            self.slots = slots
        return slots

    def hit_tokens(self) -> list[int] | None:
        """The hit of each of `loads`; None when nothing is known, or nobody holds anything."""
        hits = self.hits
        if hits is None:
            return None
        found: list[int] = hits.tokens[self.candidate_slots()].tolist()
        return found if any(found) else None


class Decision(NamedTuple):
    """The chosen candidate and why. What it says of the others is kept as it came, for `explain`."""

    load: ReplicaLoad
    reason: str  # short and constant: it labels a metric
    hit_tokens: int = 0  # predicted for the chosen one
    cost_s: float | None = None  # of the chosen one, where the policy thinks in seconds
    candidates: Sequence[ReplicaLoad] = ()
    costs: Sequence[float] | NDArray[np.float64] | None = None  # of each candidate, in the policy's own unit
    hits: Sequence[int] | NDArray[np.int32] | None = None  # tokens, of each candidate


class Policy(Protocol):
    """`choose` never mutates what it is given, and is only called with at least one candidate.

    What a policy carries from call to call (a counter, a random stream, a ring) is its own and seeded, so that a run
    replays exactly.
    """

    name: str
    reads_prefixes: bool
    """Whether `View.hits` matters to it: where not, nobody needs to tokenise."""

    def choose(self, request: Request, view: View) -> Decision: ...
