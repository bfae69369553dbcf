"""What this gateway tells of the work that comes, for whoever decides how many replicas there should be.

    measures, waiting lines, learned paces ── DemandMeter ──> Demand ── DemandTeller ──> DemandSink (the controller)

A request's work is what its tokens add to an engine's steps, at the pace learned: the prompt's uncached tokens, and an
answer as long as usual. What it shares with others, a step's fixed time, is not its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from secrets import token_hex
from typing import NamedTuple, Protocol

from headrace.gateway.admission import Admission
from headrace.gateway.metrics import GatewayMetrics, ModelMeasures
from headrace_router.cost_model import DEFAULT_PRIOR, CostModel
from headrace_router.demand import Demand, PoolDemand
from headrace_router.load_table import ReplicaLoad
from headrace_router.router import Router
from headrace_router.types import Role

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
PATIENCE_S = 5.0
"""How long a sink may take for one report."""

_SPAN_TOKENS = 1024  # over which a prompt's marginal time is taken


class DemandSink(Protocol):
    """Takes reports."""

    async def tell(self, demand: Demand) -> None:
        """May raise, and may be late: serving does not depend on it."""
        ...


class WaitingRoom(Protocol):
    """Where requests wait for a replica: `Admission`, or a simulation's."""

    def held(self, model: str) -> int:
        """Requests that wait for this model."""
        ...


class _Pace(NamedTuple):
    """Marginal seconds of one pool."""

    prefill_token_s: float
    decode_token_s: float


class _Seen(NamedTuple):
    """Of one model, at the last report."""

    arrived: int = 0
    uncached_tokens: int = 0


class DemandMeter:
    """Counts per pool. `build` is called by one loop, about once a second."""

    def __init__(self, router: Router, metrics: GatewayMetrics, waiting: WaitingRoom) -> None:
        self._router = router
        self._metrics = metrics
        self._waiting = waiting
        self._gateway = token_hex(8)
        self._sequence = 0
        self._seen: dict[str, _Seen] = {}
        self._work_s: dict[tuple[str, Role], float] = {}
        self._paces: dict[tuple[str, Role], _Pace] = {}  # last learned: a pool at zero has no replica to ask

    def build(self) -> Demand:
        """The next report."""
        self._sequence += 1
        loads: dict[tuple[str, Role], list[ReplicaLoad]] = {}
        for load in self._router.loads.all():
            loads.setdefault((load.replica.model, load.replica.role), []).append(load)
        pools = []
        for model in self._router.models():
            roles = {role for name, role in (*loads, *self._paces) if name == model} or {Role.UNIFIED}
            measures = self._metrics.of(model)
            eligible = self._router.eligible(model)
            self._count(model, measures, roles, loads)
            for role in sorted(roles):
                waits_s = [load.wait_s for load in eligible if load.replica.role is role]
                pools.append(
                    PoolDemand(
                        model,
                        role,
                        held=self._waiting.held(model),
                        arrived=measures.arrived,
                        arrived_work_s=self._work_s.get((model, role), 0.0),
                        backlog_s=sum(waits_s) / len(waits_s) if waits_s else None,
                    )
                )
        return Demand(self._gateway, self._sequence, tuple(pools))

    def _count(
        self,
        model: str,
        measures: ModelMeasures,
        roles: set[Role],
        loads: dict[tuple[str, Role], list[ReplicaLoad]],
    ) -> None:
        """Turn what arrived since the last report into work."""
        before = self._seen.get(model, _Seen())
        now = self._seen[model] = _Seen(measures.arrived, measures.arrived_tokens)
        prompts = now.uncached_tokens - before.uncached_tokens
        answers = (now.arrived - before.arrived) * measures.usual_answer_tokens
        counts = {role: len(loads.get((model, role), ())) for role in roles}
        for role in roles:
            pace = self._pace(model, role, loads.get((model, role), []), measures)
            prompt_part = _part(role, Role.DECODE, counts) * prompts * pace.prefill_token_s
            answer_part = _part(role, Role.PREFILL, counts) * answers * pace.decode_token_s
            self._work_s[model, role] = self._work_s.get((model, role), 0.0) + prompt_part + answer_part

    def _pace(self, model: str, role: Role, loads: list[ReplicaLoad], measures: ModelMeasures) -> _Pace:
        learned = max((load.cost_model for load in loads), key=lambda one: one.observed, default=None)
        known = self._paces.get((model, role))
        if learned is not None and (learned.observed or known is None):
            known = self._paces[model, role] = _pace_of(learned, measures)
        return known if known is not None else _pace_of(CostModel(DEFAULT_PRIOR), measures)


def _pace_of(model: CostModel, measures: ModelMeasures) -> _Pace:
    context = int(measures.usual_prompt_tokens + measures.usual_answer_tokens / 2)
    prefill_s = model.duration_s(_SPAN_TOKENS, 1) - model.duration_s(0, 1)
    decode_s = model.duration_s(0, 2, 2 * context) - model.duration_s(0, 1, context)
    return _Pace(max(0.0, prefill_s / _SPAN_TOKENS), max(0.0, decode_s))


def _part(role: Role, other_half: Role, counts: Mapping[Role, int]) -> float:
    """Of one half of the requests, what this pool runs: none where its role is the other half; else by replicas."""
    if role is other_half:
        return 0.0
    able = {one: count for one, count in counts.items() if one is not other_half}
    total = sum(able.values())
    return able[role] / total if total else 1 / len(able)


class DemandTeller:
    """Tells a sink once a second, and at once when somebody must wait for a replica that is not there."""

    def __init__(self, meter: DemandMeter, admission: Admission, sink: DemandSink) -> None:
        self._meter = meter
        self._sink = sink
        self._wanted = asyncio.Event()
        self._is_deaf = False  # the last report did not get through
        self._starving: set[str] = set()  # models of which this has been told
        self._admission = admission
        admission.starved = self._starved

    def _starved(self, model: str) -> None:
        # Only the first of a model: the others are in the report of their second.
        if model not in self._starving:
            self._starving.add(model)
            self._wanted.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wanted.clear()
            self._starving.intersection_update(self._admission.lines)
            await self._tell()
            # Not `wait_for`: Python 3.11's loses a cancellation that comes in the turn in which the event is set.
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._wanted.wait()

    async def _tell(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._sink.tell(self._meter.build())
        except Exception as error:  # supervision boundary: gateways serve whether or not anybody scales
            if not self._is_deaf:
                log.warning("demand could not be told, serving on: %s", str(error) or type(error).__name__)
            self._is_deaf = True
        else:
            self._is_deaf = False
