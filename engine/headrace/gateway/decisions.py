"""The last decisions, kept for people: which replica, why, and what the others would have cost.

Keeping one costs an append; it is put into words only when somebody asks (`headrace explain`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.gateway.token_choice import TokenChoice
from headrace_router.router import Handover
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
    handover: Handover | None  # who computes the prompt, where that is another one
    waited_s: float  # in the gateway, until a replica had room; 0 where it did not have to


class DecisionLog:
    """A ring of the last decisions."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=KEPT)

    def add(
        self,
        request_id: bytes,
        model: str,
        attempt: int,
        prompt: Prompt | None,
        decision: Decision,
        *,
        handover: Handover | None = None,
        waited_s: float = 0.0,
    ) -> None:
        """Keep one."""
        # Not the prompt itself: its token ids would stay in memory.
        tokens, basis = (None, None) if prompt is None else (prompt.num_tokens, prompt.choice)
        self._entries.append(
            Entry(time.time(), request_id, model, attempt, tokens, basis, decision, handover, waited_s)
        )

    def latest(self, count: int) -> list[dict[str, Any]]:
        """The last `count`, newest first, as plain data."""
        return [_words(entry) for entry in list(self._entries)[: -count - 1 : -1]]


def _words(entry: Entry) -> dict[str, Any]:
    decision, handover = entry.decision, entry.handover
    return {
        "time": round(entry.at_s, 3),
        "request_id": entry.request_id.decode(),
        "model": entry.model,
        "attempt": entry.attempt,
        "waited_s": round(entry.waited_s, 6),
        "replica": decision.load.replica.id,
        "reason": decision.reason,
        "basis": _basis(entry.basis),
        "prompt_tokens": entry.prompt_tokens,
        "predicted_hit_tokens": decision.hit_tokens,
        "cost_s": decision.cost_s,
        "candidates": _candidates(decision),
        "prefill": handover
        and {
            "replica": handover.decision.load.replica.id,
            "reason": handover.decision.reason,
            "predicted_hit_tokens": handover.decision.hit_tokens,
            "cost_s": handover.decision.cost_s,
            "moved_tokens": handover.tokens,
            "transfer_s": round(handover.transfer_s, 6),
            "candidates": _candidates(handover.decision),
        },
    }


def _candidates(decision: Decision) -> list[dict[str, Any]]:
    return [
        {
            "replica": load.replica.id,
            "cost": _at(decision.costs, row),
            "hit_tokens": _at(decision.hits, row),
        }
        for row, load in enumerate(decision.candidates)
    ]


def _at(values: Sequence[float] | Any | None, row: int) -> float | None:
    return None if values is None else round(float(values[row]), 6)


def _basis(choice: TokenChoice | None) -> str:
    """What the prompt was known by, and why no more of it: "tokens (worth it)"."""
    return "load" if choice is None else f"{choice.how} ({choice.reason})"


def decision_fields(
    policy: str, basis: TokenChoice | None, decision: Decision, handover: Handover | None = None
) -> bytes:
    """Header lines that explain one answer to its client."""
    cost = "" if decision.cost_s is None else f"; cost_s={decision.cost_s:.4f}"
    prefill = "" if handover is None else _prefill_field(handover)
    return (
        f"x-headrace-replica: {decision.load.replica.id}\r\n"
        f"x-headrace-decision: policy={policy}; basis={_basis(basis)}; hit_tokens={decision.hit_tokens}{cost}; "
        f'reason="{decision.reason}"\r\n{prefill}'
    ).encode()


def queue_field(waited_s: float, tenant: str) -> bytes:
    """A header line that tells one answer's client how long its request waited in the gateway, and as whose."""
    name = tenant.encode("ascii", "backslashreplace").decode().replace('"', "'")
    return f'x-headrace-queue: waited_s={waited_s:.4f}; tenant="{name}"\r\n'.encode()


def _prefill_field(handover: Handover) -> str:
    decision = handover.decision
    return (
        f"x-headrace-prefill: {decision.load.replica.id}; hit_tokens={decision.hit_tokens}; "
        f'moved_tokens={handover.tokens}; transfer_s={handover.transfer_s:.4f}; reason="{decision.reason}"\r\n'
    )
