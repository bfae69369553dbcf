"""Whether another replica computes a request's prompt, and which one: decided per request, in seconds.

    local(d)     = prompt(d) + answer(d)                    d computes the prompt and answers
    remote(p, d) = prompt(p) + transfer(d) + answer(d)      p computes it, d receives it and answers

    prompt   = wait + uncached · s · (1 + queued/10 + h · running/10)
    transfer = moving what d does not hold yet, at the pace learned from d's own transfers,
               + the time until d has room for it + the prompts that wait on d, or until it has a place
    answer   = 1/(10 h) of decoding there: steps as long as d's are, stretched by the share of its time that d has
               spent on prompts of late, + half of what it slows the others down by
    h        = 1 + (requests that run per replica, on average / 16)²

Nobody's role is set: a replica full of answers is dear for prompts, one that computes prompts is dear for answers, so
each keeps doing what it does. `h` hardens that as the fleet fills up: while a few requests run on each, a prompt may go
anywhere and follows its prefix; with 16 on each a running one counts double, and soon prompts leave those that decode.

What the terms are worth in goodput (TTFT < 2 s, mean ITL < 40 ms; 3,000 requests of Mooncake's conversations, 8
replicas) at 2 / 2.5 / 3 / 3.5 times their speed: as here .91 .84 .65 .39. Without hand-overs .90 .82 .50 .08, and the
mean end-to-end time is a fifth to a half longer. With h = 1 .91 .84 .62 .11. With each that runs counted in full and
h = 1 .85 .67 .58 .35: first tokens come too late. With answers counted in full .90 .84 .64 .24. A twentieth of them
instead of a tenth makes .91 .82 .69 .39, with twice the p99 of the inter-token time up to 2.5: inside the noise, the
tenth is the better for those who wait. `headrace_bench.disaggregation_study` compares the whole with pools, thresholds
and round robin.

Which p is best depends on no d and which d on no p, but for a replica not handing over to itself: so the pair is found
in one pass over each side. Where the routing policy is not `delay` it picks one replica for each half and only the
choice between local and remote is made here, by the same costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from headrace_router.halves import can_pair
from headrace_router.policies import make_policy
from headrace_router.policies.delay import BUSY, HIT, LOAD, ONLY, TIE, TIE_S, Delay
from headrace_router.replica_load import ReplicaLoad
from headrace_router.types import Request
from headrace_router.view import Decision, Policy, View

PER_REQUEST, ALWAYS_REMOTE, NEVER_REMOTE, THRESHOLD = (
    "per_request",
    "always_remote",
    "never_remote",
    "threshold",
)
DISAGGREGATIONS = (PER_REQUEST, ALWAYS_REMOTE, NEVER_REMOTE, THRESHOLD)

THRESHOLD_TOKENS = 2048
"""Uncached prompt tokens above which `threshold` goes remote: vLLM's and Dynamo's documents start from such a value."""

CHEAPER = "prefill elsewhere costs less"
ALWAYS = "prefill elsewhere, always"
LONG = "prefill elsewhere, long prompt"
QUICKEST = "least delay for the prompt"

RUNNING_WEIGHT = 0.1
HARD_RUNNING = (
    16.0  # requests that run per replica, on average over the fleet, at which that weight has doubled
)
ANSWER_WEIGHT = 0.1
ANSWER_TOKENS = 256  # expected where the request asks for more or does not say
MOST_SHARE = 0.9


class Split(NamedTuple):
    """Who answers, and who computes the prompt where that is somebody else."""

    decode: Decision
    prefill: Decision | None = None
    tokens: int = 0  # of the prompt, to be moved
    transfer_s: float = 0.0  # predicted


class Ways(NamedTuple):
    """Where a prompt may be computed."""

    local: bool  # by whoever answers
    remote: bool  # by another replica


class Disaggregation(Protocol):
    """`split` never mutates the views. Both hold at least one candidate and the hits of this request."""

    name: str

    def split(self, request: Request, answering: View, prefilling: View, policy: Policy) -> Split: ...

    def ways(self, request: Request) -> Ways:
        """Which ways `split` may take this request, as far as its length tells."""
        ...


def make_disaggregation(
    name: str, policy: str, seed: int, threshold_tokens: int = THRESHOLD_TOKENS
) -> Disaggregation:
    """Build one by name; `policy` picks the prefilling half. Raises KeyError on an unknown name."""
    if name == NEVER_REMOTE:
        return NeverRemote()
    # An object of its own: a counter shared by both halves would give each every second replica.
    picks = make_policy(policy, seed)
    if name == PER_REQUEST:
        return PerRequest(picks)
    if name == ALWAYS_REMOTE:
        return Remote(picks, 0, ALWAYS_REMOTE, ALWAYS)
    if name == THRESHOLD:
        return Remote(picks, threshold_tokens, THRESHOLD, LONG)
    raise KeyError(name)


class NeverRemote:
    """Whoever answers computes the prompt."""

    name = NEVER_REMOTE

    def split(self, request: Request, answering: View, prefilling: View, policy: Policy) -> Split:
        return Split(policy.choose(request, answering))

    def ways(self, request: Request) -> Ways:
        return Ways(local=True, remote=False)


class PerRequest:
    """The cheapest of all ways, in seconds; among equals the longest prefix, then each in turn."""

    name = PER_REQUEST

    def __init__(self, picks: Policy) -> None:
        self._picks = picks
        self._turn = 0

    def split(self, request: Request, answering: View, prefilling: View, policy: Policy) -> Split:
        if isinstance(policy, Delay):
            loads, others = answering.loads, prefilling.loads
        else:
            loads = [policy.choose(request, answering).load]
            others = [self._picks.choose(request, prefilling).load]
        hardness = fleet_hardness(answering.loads)
        self._turn += 1
        hits, hits_there = _held(loads, answering), _held(others, answering)
        costs_there = prompt_costs(request, others, hits_there, hardness)
        best = _best_by_connector(others, costs_there, hits_there, self._turn)
        totals = prompt_costs(request, loads, hits, hardness)
        ways: list[int | None] = [None] * len(loads)  # who computes the prompt, of `others`
        for index, load in enumerate(loads):
            answer = answer_s(load, request, hardness, answering.now_s)
            totals[index] += answer
            for candidate in best.get(load.replica.kv_connector, ()):
                if others[candidate] is not load:
                    remote = costs_there[candidate] + transfer_s(load, request, hits[index]) + answer
                    if remote < totals[index]:
                        totals[index], ways[index] = remote, candidate
                    break
        at = _pick(range(len(loads)), totals, hits, self._turn)
        chosen = ways[at]
        if chosen is None:
            longest = hits[at] and hits[at] == max(hits)
            reason = ONLY if len(loads) == 1 else HIT if longest else BUSY if any(hits) else LOAD
            return Split(Decision(loads[at], reason, hits[at], totals[at], loads, totals, hits))
        prefill = Decision(
            others[chosen], QUICKEST, hits_there[chosen], costs_there[chosen], others, costs_there, hits_there
        )
        return _handed_over(request, (loads, totals, hits), at, prefill, CHEAPER)

    def ways(self, request: Request) -> Ways:
        return Ways(local=True, remote=True)


class Remote:
    """Remote whenever more than so many tokens would have to be computed by whoever answers locally."""

    def __init__(self, picks: Policy, more_than: int, name: str, reason: str) -> None:
        self.name = name
        self._picks = picks
        self._more_than = more_than
        self._reason = reason

    def split(self, request: Request, answering: View, prefilling: View, policy: Policy) -> Split:
        local = policy.choose(request, answering)
        if request.size_tokens - local.hit_tokens <= self._more_than:
            return Split(local)
        prefill = self._picks.choose(request, prefilling)
        loads = answering.loads if isinstance(policy, Delay) else [local.load]
        hits = _held(loads, answering)
        hardness = fleet_hardness(answering.loads)
        costs = [
            transfer_s(load, request, hit) + answer_s(load, request, hardness, answering.now_s)
            for load, hit in zip(loads, hits, strict=True)
        ]
        able = [at for at, load in enumerate(loads) if can_pair(prefill.load.replica, load.replica)]
        if not able:
            return Split(local)
        return _handed_over(
            request, (loads, costs, hits), min(able, key=costs.__getitem__), prefill, self._reason
        )

    def ways(self, request: Request) -> Ways:
        is_long = request.size_tokens > self._more_than
        return Ways(local=not is_long, remote=is_long)


def fleet_hardness(loads: Sequence[ReplicaLoad]) -> float:
    """1 while the fleet is empty; the fuller, the less prompts and answers mix."""
    mean = sum([load.requests - load.queued for load in loads]) / len(loads)
    return 1.0 + (mean / HARD_RUNNING) ** 2


def prompt_costs(
    request: Request, loads: Sequence[ReplicaLoad], hits: Sequence[int], hardness: float
) -> list[float]:
    """Of computing the prompt on each of `loads`, in seconds."""
    tokens, costs = request.size_tokens, []
    weight = RUNNING_WEIGHT * hardness
    for load, hit in zip(loads, hits, strict=True):
        wait_s = load.turn_s
        if tokens > load.room_tokens:
            wait_s = max(wait_s, load.memory_wait_s(tokens))
        queued = load.queued
        others = RUNNING_WEIGHT * queued + weight * (load.requests - queued)
        costs.append(wait_s + (tokens - hit) * load.token_s * (1.0 + others))
    return costs


def transfer_s(load: ReplicaLoad, request: Request, hit_tokens: int) -> float:
    """Of receiving the prompt there, until the answer can go on."""
    moved = request.size_tokens - hit_tokens
    return load.transfer_model.duration_s(moved) + load.memory_wait_s(moved) + load.turn_s


def answer_s(load: ReplicaLoad, request: Request, hardness: float, now_s: float) -> float:
    """Of decoding an answer there: its own time and that by which it slows down those that run."""
    running = max(0, load.requests - load.queued)
    tokens = min(request.max_tokens or ANSWER_TOKENS, ANSWER_TOKENS)
    model, held = load.cost_model, int(load.held_tokens)
    alone_s = model.duration_s(0, running, held)
    step_s = model.duration_s(0, running + 1, held + request.size_tokens)
    share = min(load.prefill_share(now_s), MOST_SHARE)
    return ANSWER_WEIGHT / hardness * tokens * (step_s / (1.0 - share) + 0.5 * running * (step_s - alone_s))


def _held(loads: Sequence[ReplicaLoad], view: View) -> list[int]:
    if view.hits is None:
        return [0] * len(loads)
    tokens = view.hits.tokens
    return [int(tokens[load.slot]) for load in loads]


def _pick(indices: Iterable[int], costs: Sequence[float], hits: Sequence[int], turn: int) -> int:
    """The cheapest; among near equals the longest prefix, then each in turn. Policy `delay` has the same bound, and a
    wider one between replicas that hold the same, which was found later and is not in the study of these costs."""
    indices = list(indices)
    bound = min([costs[index] for index in indices]) * TIE + TIE_S
    near = [index for index in indices if costs[index] <= bound]
    if len(near) > 1:
        longest = max([hits[index] for index in near])
        near = [index for index in near if hits[index] == longest]
    return near[turn % len(near)]


def _best_by_connector(
    loads: Sequence[ReplicaLoad], costs: Sequence[float], hits: Sequence[int], turn: int
) -> dict[str | None, list[int]]:
    """The two best of each connector, best first: the second for when the first is the one that answers."""
    groups: dict[str | None, list[int]] = {}
    for index, load in enumerate(loads):
        groups.setdefault(load.replica.kv_connector, []).append(index)
    for group in groups.values():
        best = _pick(group, costs, hits, turn)
        rest = [index for index in group if index != best]
        group[:] = [best, _pick(rest, costs, hits, turn)] if rest else [best]
    return groups


def _handed_over(
    request: Request,
    candidates: tuple[Sequence[ReplicaLoad], Sequence[float], Sequence[int]],
    at: int,
    prefill: Decision,
    reason: str,
) -> Split:
    """`candidates`: who might answer, the cost with each, the tokens each holds. The one at `at` does."""
    loads, costs, hits = candidates
    load, moved = loads[at], request.size_tokens - hits[at]
    decode = Decision(load, reason, hits[at], costs[at], loads, costs, hits)
    return Split(decode, prefill, moved, load.transfer_model.duration_s(moved))
