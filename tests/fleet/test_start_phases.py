"""A start by its phases, and how they are told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from headrace.fleet.fleet_metrics import FleetMetrics
from headrace.fleet.start_phases import in_words, of_start
from headrace.fleet.status import FleetStatus, ReplicaStatus, RolloutStatus
from headrace.fleet.status_words import notes
from headrace_router.types import ReplicaId, ReplicaState, Role

READY = ReplicaStatus(
    ReplicaId("m-unified-0"),
    "m",
    Role.UNIFIED,
    ReplicaState.READY,
    state_s=5.0,
    phases_s=(("placing", 0.0), ("process", 2.0), ("imports", 14.0), ("weights", 0.2)),
)
STATUS = FleetStatus("f", "e", 1, (READY,))

seconds = st.floats(0, 100)


def test_what_no_phase_accounts_for_is_the_start_of_a_process() -> None:
    assert of_start(10.0, 11.0, 31.0, (("imports", 14.0), ("engine", 3.0), ("imports", 1.0))) == (
        ("placing", 1.0),
        ("process", 2.0),
        ("imports", 15.0),
        ("engine", 3.0),
    )


@given(seconds, seconds, seconds, st.lists(st.tuples(st.sampled_from("abc"), seconds)))
def test_the_phases_add_up_to_the_whole_start(
    placing: float, process: float, asked_s: float, backend: list[tuple[str, float]]
) -> None:
    placed_s = asked_s + placing
    ready_s = placed_s + process + sum(took_s for _, took_s in backend)
    phases = of_start(asked_s, placed_s, ready_s, tuple(backend))
    assert sum(took_s for _, took_s in phases) == pytest.approx(ready_s - asked_s, abs=1e-6)
    assert len({name for name, _ in phases}) == len(phases)


def test_people_read_the_phases_that_took_time() -> None:
    assert in_words(READY.phases_s) == "process 2.0 s, imports 14 s, weights 0.2 s"
    assert notes(STATUS) == ["last start: m-unified-0 in 16.2 s: process 2.0 s, imports 14 s, weights 0.2 s"]


def test_the_newest_start_of_each_pool_is_told() -> None:
    newer = replace(READY, id=ReplicaId("m-unified-1"), state_s=1.0, phases_s=(("waking", 0.5),))
    other = replace(READY, id=ReplicaId("n-unified-0"), model="n", phases_s=())
    assert notes(replace(STATUS, replicas=(READY, newer, other))) == [
        "last start: m-unified-1 in 0.5 s: waking 0.5 s"
    ]


def test_the_last_change_is_told_with_its_reason() -> None:
    rollout = RolloutStatus("id", "apply", "stopped", 1, 3, "m-unified-3 did not start: no memory")
    assert notes(replace(STATUS, replicas=(), rollout=rollout)) == [
        "last change: apply, stopped, 1 of 3 replaced: m-unified-3 did not start: no memory"
    ]


def test_prometheus_reads_them_too() -> None:
    registry, metrics = CollectorRegistry(), FleetMetrics()
    registry.register(metrics)
    metrics.status = replace(STATUS, rollout=RolloutStatus("id", "restart", "rolling", 1, 2))
    text = generate_latest(registry).decode()
    assert 'headrace_replica_start_seconds{phase="imports",replica="m-unified-0"} 14.0' in text
    assert "headrace_rollout_running 1.0" in text
    assert "headrace_rollout_replaced 1.0" in text
