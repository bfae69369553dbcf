"""What a gateway tells of the work that comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.config import Queue
from headrace.gateway.admission import Admission
from headrace.gateway.demand import DemandMeter, DemandTeller
from headrace.gateway.metrics import ANSWER_TOKENS, GatewayMetrics
from headrace.gateway.openai import Usage
from headrace_router.cost_model import DEFAULT_PRIOR
from headrace_router.demand import PoolDemand
from headrace_router.policies import make_policy
from headrace_router.router import Router
from headrace_router.types import (
    BootId,
    Endpoints,
    Iteration,
    LoadReport,
    Membership,
    Replica,
    ReplicaId,
    Role,
)


class Gateway:
    """What a meter reads, without sockets."""

    def __init__(self, *roles: Role) -> None:
        self.router = Router(make_policy("delay", 0))
        self.metrics = GatewayMetrics(self.router)
        self.admission = Admission(Queue(), self.router, asyncio.new_event_loop())
        self.admission._loop.close()
        self.meter = DemandMeter(self.router, self.metrics, self.admission)
        self.has(*roles)

    def has(self, *roles: Role) -> None:
        endpoints = Endpoints("http://127.0.0.1:1", load="tcp://127.0.0.1:2")
        replicas = [
            Replica(ReplicaId(f"{role}-{number}"), BootId("1"), "m", role, endpoints)
            for number, role in enumerate(roles)
        ]
        self.router.set_membership(Membership(1, tuple(replicas), models=("m",)), 0.0)

    def arrive(self, count: int, tokens: int) -> None:
        measures = self.metrics.of("m")
        measures.arrived += count
        measures.arrived_tokens += count * tokens

    def pools(self) -> dict[Role, PoolDemand]:
        return {pool.role: pool for pool in self.meter.build().pools}


def test_work_is_what_the_tokens_of_prompts_and_usual_answers_add_to_steps() -> None:
    gateway = Gateway(Role.UNIFIED)
    assert gateway.pools()[Role.UNIFIED].arrived_work_s == 0
    gateway.arrive(10, 1000)
    prior = DEFAULT_PRIOR
    expected = 10 * (1000 * prior.prefill_token_s + ANSWER_TOKENS * prior.decode_sequence_s)
    pool = gateway.pools()[Role.UNIFIED]
    assert pool.arrived == 10
    assert pool.arrived_work_s == pytest.approx(expected, rel=1e-6)
    assert gateway.pools()[Role.UNIFIED].arrived_work_s == pool.arrived_work_s, "a counter"


def test_each_of_two_pools_counts_its_own_half() -> None:
    gateway = Gateway(Role.PREFILL, Role.DECODE)
    gateway.arrive(10, 1000)
    pools = gateway.pools()
    prior = DEFAULT_PRIOR
    assert pools[Role.PREFILL].arrived_work_s == pytest.approx(10 * 1000 * prior.prefill_token_s, rel=1e-6)
    assert pools[Role.DECODE].arrived_work_s == pytest.approx(
        10 * ANSWER_TOKENS * prior.decode_sequence_s, rel=1e-6
    )


def test_answers_are_as_long_as_they_have_been() -> None:
    gateway = Gateway(Role.UNIFIED)
    for _ in range(300):
        gateway.metrics.of("m").finish(200, "", 1.0, Usage(100, 10, 50))
    measures = gateway.metrics.of("m")
    assert measures.usual_answer_tokens == pytest.approx(10, rel=0.1)
    assert measures.usual_hits == pytest.approx(0.5, rel=0.1)


def test_errors_teach_nothing_of_answers() -> None:
    gateway = Gateway(Role.UNIFIED)
    for _ in range(300):
        gateway.metrics.of("m").finish(500, "replica_answer", 1.0, Usage(100, 0, 0))
    assert gateway.metrics.of("m").usual_answer_tokens == ANSWER_TOKENS


def test_a_pool_at_zero_is_told_by_the_pace_it_last_had() -> None:
    gateway = Gateway(Role.UNIFIED)
    steps = tuple(Iteration(0.01 + 0.002 * tokens, tokens, 0) for tokens in range(100, 1000, 20))
    gateway.router.report(
        LoadReport(ReplicaId("unified-0"), BootId("1"), 1, 0, 0, 0.0, 0, iterations=steps), 0.0
    )
    gateway.metrics.of("m").usual_answer_tokens = 0.0
    gateway.pools()
    gateway.has()
    gateway.arrive(1, 1000)
    pool = gateway.pools()[Role.UNIFIED]
    assert pool.backlog_s is None
    assert pool.arrived_work_s == pytest.approx(2.0, rel=0.2), "the prior would say 0.06"


def test_a_model_that_never_had_a_replica_is_told_of_too() -> None:
    gateway = Gateway()
    gateway.arrive(1, 1000)
    pool = gateway.pools()[Role.UNIFIED]
    assert (pool.model, pool.arrived, pool.backlog_s) == ("m", 1, None)
    assert pool.arrived_work_s > 0


def test_reports_are_numbered_and_name_their_gateway() -> None:
    gateway = Gateway(Role.UNIFIED)
    first, second = gateway.meter.build(), gateway.meter.build()
    assert (first.sequence, second.sequence) == (1, 2)
    assert first.gateway == second.gateway != Gateway().meter.build().gateway


class Failing:
    """A sink that fails until it is told not to."""

    def __init__(self) -> None:
        self.calls = 0
        self.heard = asyncio.Event()
        self.fails = True

    async def tell(self, demand: Any) -> None:
        self.calls += 1
        self.heard.set()
        if self.fails:
            raise RuntimeError("away")


async def test_a_sink_that_fails_is_told_again_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    gateway, sink = Gateway(Role.UNIFIED), Failing()
    teller = DemandTeller(gateway.meter, gateway.admission, sink)
    task = asyncio.ensure_future(teller.run())
    await sink.heard.wait()
    for number in range(3):  # each starving model is told of at once
        sink.heard.clear()
        gateway.admission.starved(f"m{number}")
        await sink.heard.wait()
    assert sink.calls == 4
    assert len([record for record in caplog.records if "demand could not be told" in record.message]) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
