"""The last decisions, kept for people: which replica, why, and what the others would have cost.

Keeping one costs an append; it is put into words only when somebody asks (`headrace explain`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.gateway.token_choice import TokenChoice
from headrace_router.view import Decision

if TYPE_CHECKING:  # importing it for real would bring numba, which a policy that reads no prompts never needs
    from headrace.gateway.prompt_reader import Prompt

KEPT = 256


class Entry(NamedTuple):
    """One decision as it was made."""

    at_s: float  # wall clock
    request_id: bytes
    model: str
    attempt: int  # 1, or more after a replica failed
    prompt_tokens: int | None
    basis: TokenChoice | None  # what the prompt was known by; None where the policy does not want to know
    decision: Decision


class DecisionLog:
    """A ring of the last decisions."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=KEPT)

    def add(
        self, request_id: bytes, model: str, attempt: int, prompt: Prompt | None, decision: Decision
    ) -> None:
        """Keep one."""
        # Not the prompt itself: its token ids would stay in memory.
        tokens, basis = (None, None) if prompt is None else (prompt.num_tokens, prompt.choice)
        self._entries.append(Entry(time.time(), request_id, model, attempt, tokens, basis, decision))

    def latest(self, count: int) -> list[dict[str, Any]]:
        """The last `count`, newest first, as plain data."""
        return [_words(entry) for entry in list(self._entries)[: -count - 1 : -1]]


def _words(entry: Entry) -> dict[str, Any]:
    decision = entry.decision
    return {
        "time": round(entry.at_s, 3),
        "request_id": entry.request_id.decode(),
        "model": entry.model,
        "attempt": entry.attempt,
        "replica": decision.load.replica.id,
        "reason": decision.reason,
        "basis": _basis(entry.basis),
        "prompt_tokens": entry.prompt_tokens,
        "predicted_hit_tokens": decision.hit_tokens,
        "cost_s": decision.cost_s,
        "candidates": [
            {
                "replica": load.replica.id,
                "cost": _at(decision.costs, row),
                "hit_tokens": _at(decision.hits, row),
            }
            for row, load in enumerate(decision.candidates)
        ],
    }


def _at(values: Sequence[float] | Any | None, row: int) -> float | None:
    return None if values is None else round(float(values[row]), 6)


def _basis(choice: TokenChoice | None) -> str:
    """What the prompt was known by, and why no more of it: "tokens (worth it)"."""
    return "load" if choice is None else f"{choice.how} ({choice.reason})"


def decision_fields(policy: str, basis: TokenChoice | None, decision: Decision) -> bytes:
    """Header lines that explain one answer to its client."""
    cost = "" if decision.cost_s is None else f"; cost_s={decision.cost_s:.4f}"
    return (
        f"x-headrace-replica: {decision.load.replica.id}\r\n"
        f"x-headrace-decision: policy={policy}; basis={_basis(basis)}; hit_tokens={decision.hit_tokens}{cost}; "
        f'reason="{decision.reason}"\r\n'
    ).encode()
