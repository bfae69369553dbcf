"""What `headrace quota` and the metrics show of tenants that share GPUs."""

from __future__ import annotations

import io
import json

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from headrace.config import parse
from headrace.fleet.fleet_metrics import FleetMetrics
from headrace.fleet.gpu_book import GpuBook
from headrace.fleet.gpu_share import QuotaRules
from headrace.fleet.quota_command import show
from headrace.fleet.quota_status import QuotaStatus
from headrace.fleet.slot import Slot
from headrace.fleet.specs import ReplicaSpec, expand
from headrace.fleet.status import FleetStatus
from headrace_router.types import ReplicaId, ReplicaState

CONFIG = parse(
    {
        "fleet": {
            "simulated_nodes": [{"accelerator": "H100", "gpus": 4}],
            "quota": {"min_run_s": 60},
        },
        "models": [
            {"name": name, "backend": "simulated", "pools": [{"replicas": replicas, "tenant": name}]}
            for name, replicas in (("search", 2), ("chat", 4))
        ],
        "tenants": [
            {"name": "search", "weight": 2.0, "gpus": {"H100": {"nominal": 2, "borrowing_limit": 1}}},
            {"name": "chat", "gpus": {"H100": {"nominal": 2, "lending_limit": 0}}},
        ],
    }
)


class Told:
    """A book, and replicas that are ready as soon as they may start."""

    def __init__(self) -> None:
        self.book = GpuBook(QuotaRules.of(CONFIG))
        self.slots: dict[ReplicaId, Slot] = {}
        self.wanted = {spec.id: spec for spec in expand(CONFIG, 2, 0)}

    def round(self, now_s: float, *models: str) -> dict[ReplicaId, ReplicaSpec]:
        wanted = {name: spec for name, spec in self.wanted.items() if spec.model in models}
        runnable = self.book.round(wanted, self.slots, now_s)
        for name, spec in runnable.items():
            self.slots.setdefault(name, Slot(spec, ReplicaState.READY, now_s, spots=self.book.spots(name)))
        return runnable

    def status(self, now_s: float) -> QuotaStatus:
        status = self.book.status("two-teams", now_s)
        assert status is not None
        return status


@pytest.fixture
def reclaiming() -> Told:
    """Chat borrowed both of search's GPUs, and gives them back."""
    told = Told()
    told.round(0.0, "chat")
    told.round(100.0, "chat", "search")
    return told


def test_the_tables_say_who_drains_for_whom_and_who_waits_for_what(reclaiming: Told) -> None:
    out = io.StringIO()
    show(reclaiming.status(103.0), False, out)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines[:4] == [
        "fleet two-teams, in GPUs",
        "tenant kind nominal held borrowed lent draining waiting may-borrow lends weight",
        "search H100 2 0 0 0 0 2 1 all 2",
        "chat H100 2 2 0 0 2 0 any 0 1",
    ]
    assert any(
        line.startswith("chat-unified-2 chat H100 1 1m43s simulated-0 drains for search-unified-")
        for line in lines
    )
    (first,) = [line for line in lines if line.startswith("search-unified-0")]
    assert first.startswith(
        "search-unified-0 search H100 1 3s within the nominal 2 H100 of tenant 'search': it waits"
    )
    assert first.endswith("to drain")


def test_programs_get_the_same_as_json(reclaiming: Told) -> None:
    out = io.StringIO()
    show(reclaiming.status(103.0), True, out)
    data = json.loads(out.getvalue())
    assert data["fleet"] == "two-teams"
    assert data["nodes"] == [{"node": "simulated-0", "kind": "H100", "gpus": 4, "held": 4}]
    assert [row["is_promised"] for row in data["waiting"]] == [True, True]
    assert data["replicas"][0]["spots"] == [{"node_id": "simulated-0", "gpus": 1}]
    assert {row["drains_for"] for row in data["replicas"] if row["is_draining"]} == {
        "search-unified-0", "search-unified-1",
    }  # fmt: skip


def test_the_metrics_count_gpus_by_tenant_and_state(reclaiming: Told) -> None:
    metrics = FleetMetrics()
    metrics.status = FleetStatus("f", "e", 1, (), gpus=reclaiming.status(103.0).tenants)
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    assert 'headrace_gpus{kind="H100",state="draining",tenant="chat"} 2.0' in text
    assert 'headrace_gpus{kind="H100",state="waiting",tenant="search"} 2.0' in text


def test_what_gives_gpus_back_may_not_run_and_says_so_in_the_status(reclaiming: Told) -> None:
    runnable = reclaiming.round(101.0, "chat", "search")
    assert sorted(runnable) == ["chat-unified-0", "chat-unified-1"]
    assert reclaiming.book.hopeless == frozenset(), "search's were promised theirs"
    rows = {
        row.id: row
        for row in reclaiming.book.told([slot.row(101.0) for slot in reclaiming.slots.values()], 101.0)
    }
    assert rows[ReplicaId("chat-unified-3")].reason.startswith("gives its GPUs back: for search-unified-")
    assert rows[ReplicaId("search-unified-0")].waits_for_gpus


def test_a_replica_that_has_given_up_leaves_its_gpus_to_others() -> None:
    told = Told()
    told.round(0.0, "search", "chat")
    assert len(told.slots) == 4
    failed = told.slots[ReplicaId("search-unified-0")]
    failed.started = None
    failed.fail("no such model", is_fatal=True, now_s=1.0)
    told.round(1.0, "search", "chat")
    assert sum(spec.model == "chat" for spec in told.round(2.0, "search", "chat").values()) == 3
    assert "search-unified-0" not in {row.replica for row in told.status(2.0).waiting}


def test_without_quotas_everything_may_run() -> None:
    book = GpuBook(None)
    wanted = {spec.id: spec for spec in expand(CONFIG, 2, 0)}
    assert book.round(wanted, {}, 0.0) == wanted
    assert book.status("f", 0.0) is None
    assert book.spots(ReplicaId("search-unified-0")) == ()
