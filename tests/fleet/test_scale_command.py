"""What people and Prometheus see of scaling."""

from __future__ import annotations

import argparse
import io
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from headrace.errors import BadRequest
from headrace.fleet import scale_command
from headrace.fleet.fleet_metrics import FleetMetrics
from headrace.fleet.screen import Screen, pool_table
from headrace.fleet.status import FleetStatus, PoolStatus, ReplicaStatus
from headrace_router.types import ReplicaId, ReplicaState, Role

POOL = PoolStatus(
    "m", "m", Role.UNIFIED, ready=1, target=3, least=0, most=8, reason="waiting asks for 2.5",
    needs={"waiting": 2.5}, doubts=("kv_use is missing",), cold_start_s=41.5,
)  # fmt: skip


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scale_command.add_parser(parser.add_subparsers())
    return parser.parse_args(["scale", *words])


@pytest.mark.parametrize(
    "words", [["m", "3", "--auto"], ["--auto"], ["m", "3", "--why"], ["m", "--auto", "--why"]]
)
def test_arguments_that_do_not_go_together_are_refused_before_a_fleet_is_looked_for(words: list[str]) -> None:
    with pytest.raises(BadRequest):
        scale_command.run(arguments(*words))


def shown(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=250).print(table)
    return out.getvalue()


def test_the_table_of_pools_tells_target_bounds_and_reason() -> None:
    assert shown(pool_table([POOL])).splitlines()[1].split() == [
        "m", "1", "3", "0", "8", "waiting", "asks", "for", "2.5"
    ]  # fmt: skip


def test_a_decision_is_told_with_its_inputs_and_every_doubt() -> None:
    decision = {
        "at": 0.0, "pool": "m", "target": 3, "current": 1, "effect": "applied", "pin": None,
        "reason": "not below 1: kv_use is missing", "doubts": ["kv_use is missing", "held is -1"],
        "needs": {"waiting": 2.5}, "inputs": {"held": 3, "kv_use": None, "backlog_s": 0.5},
    }  # fmt: skip
    told = shown(scale_command.decision_table([decision], "changes"))
    assert "1 -> 3" in told
    assert "kv_use is missing; held is -1" in told
    assert "waiting 2.5" in told
    assert "held 3, backlog_s 0.5" in told


def status(*replicas: ReplicaStatus, pool: PoolStatus = POOL) -> FleetStatus:
    return FleetStatus("f", "e", 1, replicas, (pool,))


def replica(number: int, state: ReplicaState = ReplicaState.READY) -> ReplicaStatus:
    return ReplicaStatus(ReplicaId(f"m-unified-{number}"), "m", Role.UNIFIED, state, 1.0)


def test_prometheus_sees_pools_once_there_is_a_status() -> None:
    metrics, registry = FleetMetrics(), CollectorRegistry()
    registry.register(metrics)
    assert generate_latest(registry) == b""
    metrics.status = status(replica(0), replica(1, ReplicaState.DRAINING))
    text = generate_latest(registry).decode()
    for line in (
        'headrace_pool_replicas{pool="m",state="ready"} 1.0',
        'headrace_pool_replicas{pool="m",state="draining"} 1.0',
        'headrace_pool_target{pool="m"} 3.0',
        'headrace_pool_bound{bound="most",pool="m"} 8.0',
        'headrace_pool_need{input="waiting",pool="m"} 2.5',
        'headrace_pool_doubts{pool="m"} 1.0',
        'headrace_pool_cold_start_seconds{pool="m"} 41.5',
    ):
        assert line in text, text


def test_the_screen_says_when_a_pool_is_to_grow_and_when_a_replica_has_gone() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    screen.changes(status(replica(0), replica(1)))
    screen.changes(status(replica(0), pool=replace(POOL, target=1, reason="at most 1 were needed")))
    said = err.getvalue()
    assert "m: 3 -> 1 replicas, at most 1 were needed" in said
    assert "m-unified-1: gone" in said


def test_a_fleet_that_sleeps_says_so_when_it_is_ready() -> None:
    out, err = io.StringIO(), io.StringIO()
    Screen(out, err).ready("http://127.0.0.1:1", status())
    assert "no replica of m runs yet; the first request starts one" in err.getvalue()
    assert '"model": "m"' in out.getvalue()
