"""Replicas as claims and back: what may start, what has to drain, and what it comes to when that is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import parse
from headrace.fleet.gpu_quota_spec import Claim, GpuNode, Quota, Tenant
from headrace.fleet.gpu_share import QuotaRules, Sharer, Shares, share
from headrace.fleet.quota_status import quota_status
from headrace.fleet.specs import expand
from headrace_router.types import ReplicaId

MIN_RUN_S = 100.0
NODE = GpuNode("n1", "h100", 4)


def rules(*tenants: Tenant) -> QuotaRules:
    return QuotaRules(tenants, {}, MIN_RUN_S)


HALVES = rules(Tenant("a", {"h100": Quota(2)}), Tenant("b", {"h100": Quota(2)}))


def sharer(
    name: str, *, wanted: bool = True, present: bool = True, idle: bool = False, gpus: int = 1
) -> Sharer:
    return Sharer(Claim(name, name[0], f"m-{name[0]}", "h100", gpus), wanted, present, idle)


def names(ids: Iterable[str]) -> str:
    return " ".join(sorted(ids))


def borrowed() -> Shares:
    """Of four GPUs tenant a has all, two of them tenant b's."""
    all_of_a = [sharer(f"a{number}", present=False) for number in range(4)]
    return share(HALVES, [NODE], all_of_a, Shares(), 0.0)


# --- one round


def test_a_replica_may_start_where_it_was_admitted_and_nowhere_else() -> None:
    shares = share(HALVES, [NODE], [sharer("a0", present=False), sharer("b0", gpus=5)], Shares(), 0.0)
    assert shares.spots(ReplicaId("a0")) == (("n1", 1),)
    assert shares.spots(ReplicaId("b0")) is None
    assert "the biggest node has 4" in shares.waiting[ReplicaId("b0")]


def test_a_drained_borrower_keeps_its_gpus_until_it_is_gone_and_then_waits() -> None:
    a = [sharer(f"a{number}") for number in range(4)]
    asked = share(HALVES, [NODE], [*a, sharer("b0", present=False)], borrowed(), 200.0)
    (taken,) = [name for name, grant in asked.grants.items() if grant.taken]
    assert asked.spots(taken) is None, "it may not be started again"
    assert asked.promised == {"b0"}
    draining = share(HALVES, [NODE], [*a, sharer("b0", present=False)], asked, 201.0)
    assert draining.grants == asked.grants, "nobody else goes meanwhile"
    gone = [sharer(one.id, present=one.id != taken) for one in a]
    after = share(HALVES, [NODE], [*gone, sharer("b0", present=False)], draining, 202.0)
    assert after.spots(ReplicaId("b0")) is not None
    assert after.spots(taken) is None
    assert "no room" in after.waiting[taken] or "it would borrow" in after.waiting[taken]


def test_a_replica_that_fails_or_restarts_comes_back_to_its_gpus() -> None:
    before = borrowed()
    absent = [sharer(f"a{number}", present=False) for number in range(4)]
    assert share(HALVES, [NODE], absent, before, 50.0).grants == before.grants


def test_what_is_no_longer_wanted_holds_its_gpus_until_it_is_gone() -> None:
    before = borrowed()
    a = [sharer(f"a{number}", wanted=number > 0) for number in range(4)]
    leaving = share(HALVES, [NODE], [*a, sharer("b0", present=False)], before, 200.0)
    assert "a0" in leaving.grants
    assert not any(grant.taken for grant in leaving.grants.values()), "what leaves already makes the room"
    a[0] = sharer("a0", wanted=False, present=False)
    after = share(HALVES, [NODE], [*a, sharer("b0", present=False)], leaving, 201.0)
    assert names(after.grants) == "a1 a2 a3 b0"


def test_one_that_is_wanted_again_while_it_drains_keeps_its_gpus() -> None:
    before = borrowed()
    leaving = share(HALVES, [NODE], [sharer(f"a{n}", wanted=n > 0) for n in range(4)], before, 200.0)
    again = share(HALVES, [NODE], [sharer(f"a{n}") for n in range(4)], leaving, 201.0)
    assert again.grants == before.grants


def test_of_those_that_borrow_the_idle_one_goes_first() -> None:
    a = [sharer(f"a{number}", idle=number == 3) for number in range(4)]
    asked = share(HALVES, [NODE], [*a, sharer("b0", present=False)], borrowed(), 200.0)
    assert [name for name, grant in asked.grants.items() if grant.taken] == ["a3"]


def test_replicas_of_a_lost_node_are_told_and_wait_or_start_elsewhere() -> None:
    nodes = [NODE, GpuNode("n2", "h100", 4)]
    wide = rules(Tenant("a", {"h100": Quota(4)}), Tenant("b", {"h100": Quota(4)}))
    both = [
        *(sharer(f"a{n}", present=False) for n in range(4)),
        *(sharer(f"b{n}", present=False) for n in range(4)),
    ]
    before = share(wide, nodes, both, Shares(), 0.0)
    here = [name for name, grant in before.grants.items() if grant.spots[0].node_id == "n1"]
    after = share(wide, [nodes[1]], [sharer(one.id) for one in both], before, 200.0)
    assert names(after.lost) == names(here)
    assert set(after.waiting) == set(here)
    assert set(after.grants) == {one.id for one in both} - set(here)


def test_of_those_that_wait_more_nodes_would_help_those_within_their_tenants_own() -> None:
    both = [sharer(name, present=False) for name in ("a0", "a1", "a2", "b0", "b1")]
    shares = share(HALVES, [GpuNode("n1", "h100", 1)], both, Shares(), 0.0)
    assert names(shares.grants) == "a0"
    assert names(shares.short) == "a1 b0 b1"
    assert names(share(HALVES, [], both, Shares(), 0.0).short) == "a0 a1 b0 b1"


def test_a_configuration_says_who_claims_what() -> None:
    pool = {"tenant": "a", "priority": -1, "tensor_parallel": 2}
    config = parse(
        {
            "models": [
                {"name": "s", "backend": "simulated", "pools": [pool]},
                {"name": "c", "source": "org/m", "pools": [{"device": "cpu"}]},
            ],
            "tenants": [{"name": "a", "weight": 2.0, "gpus": {"H100": {"nominal": 4, "lending_limit": 1}}}],
            "fleet": {"simulated_nodes": [{"accelerator": "H100", "gpus": 8}], "quota": {"min_run_s": 5}},
        }
    )
    found = QuotaRules.of(config)
    assert found is not None
    simulated, on_cpu = expand(config, 2, 0)
    assert found.claim(on_cpu) is None
    assert found.claim(simulated, 3.0) == Claim("s-unified-0", "a", "s", "H100", 2, 1, -1, 3.0)
    assert (found.min_run_s, found.simulated_nodes) == (5.0, (("simulated-0", "H100", 8),))
    assert found.tenants == (Tenant("a", {"H100": Quota(4, None, 1)}, 2.0),)


# --- a fleet that does what it is told


@dataclass
class Fleet:
    """Replicas that start where they may, drain slowly, crash, and lose their nodes."""

    rules: QuotaRules
    nodes: list[GpuNode]
    rng: Random
    wanted: dict[str, Claim] = field(default_factory=dict)
    running: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    claims: dict[str, Claim] = field(default_factory=dict)
    shares: Shares = field(default_factory=Shares)
    now_s: float = 1000.0
    starts: Counter[str] = field(default_factory=Counter)
    drains: Counter[str] = field(default_factory=Counter)

    def round(self) -> Shares:
        known = {*self.wanted, *self.running}
        sharers = [
            Sharer(self.claims[name], name in self.wanted, name in self.running, self.rng.random() < 0.3)
            for name in sorted(known)
        ]
        before, self.shares = self.shares, share(self.rules, self.nodes, sharers, self.shares, self.now_s)
        shares = self.shares
        for name in shares.lost:
            self.running.pop(name, None)
            self.draining.discard(name)
        for name in sorted(self.running):
            if name not in self.draining and (
                name not in self.wanted or shares.spots(ReplicaId(name)) is None
            ):
                self.draining.add(name)
                self.drains[name] += 1
        for name in sorted(self.wanted):
            spots = shares.spots(ReplicaId(name))
            if name not in self.running and spots is not None:
                self.running[name] = spots
                self.starts[name] += 1
        self.check(before)
        status = quota_status(
            "f", rules=self.rules, nodes=self.nodes, sharers=sharers, shares=shares, now_s=self.now_s
        )
        check_status(status)
        return shares

    def check(self, before: Shares) -> None:
        for name, spots in self.running.items():
            grant = self.shares.grants.get(ReplicaId(name))
            assert grant is not None and grant.spots == spots, f"{name} runs where it was not admitted"
        new = {name for name in self.shares.grants if name not in before.grants}
        for node in self.nodes:
            held = [
                (name, gpus)
                for name, grant in self.shares.grants.items()
                for node_id, gpus in grant.spots
                if node_id == node.id
            ]
            if any(name in new for name, _ in held):
                assert sum(gpus for _, gpus in held) <= node.gpus, "a GPU was given twice"
        for name in self.wanted:
            is_told = name in self.shares.waiting
            assert is_told != (name in self.shares.grants), f"{name} neither has GPUs nor waits"

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        for name in sorted(self.running):
            if name in self.draining and self.rng.random() < 0.5:
                del self.running[name]
                self.draining.discard(name)
            elif self.rng.random() < 0.05:
                del self.running[name]  # a crash
                self.draining.discard(name)

    def settle(self) -> None:
        quiet = 0
        for _ in range(40 + 12 * len(self.claims)):
            moved = self.starts.total() + self.drains.total()
            self.round()
            crash_free = [name for name in self.running if name in self.draining]
            for name in crash_free:
                if self.rng.random() < 0.6:
                    del self.running[name]
                    self.draining.discard(name)
            self.now_s += MIN_RUN_S / 2
            same = moved == self.starts.total() + self.drains.total() and not self.draining
            quiet = quiet + 1 if same else 0
            if quiet > 3:
                return
        raise AssertionError(f"no end: {self.starts} {self.drains}")

    def want(self) -> None:
        """Targets change."""
        name = f"{self.rng.choice('ab')}{self.rng.randrange(6)}"
        if name in self.wanted:
            del self.wanted[name]
        else:
            if name not in self.claims:
                self.claims[name] = Claim(
                    name, name[0], f"m-{name[0]}", "h100", self.rng.choice([1, 1, 2]), 1,
                    self.rng.randrange(2), self.now_s,
                )  # fmt: skip
            self.wanted[name] = self.claims[name]


def check_status(status: object) -> None:
    rows = status.tenants  # type: ignore[attr-defined]
    nobodys = max(0, sum(node.gpus for node in status.nodes) - sum(row.nominal for row in rows))  # type: ignore[attr-defined]
    borrowed_gpus = sum(row.borrowed for row in rows)
    lent = sum(row.lent for row in rows)
    assert borrowed_gpus - nobodys <= lent <= borrowed_gpus or lent == sum(
        max(0, row.nominal - row.held) for row in rows
    )
    for row in rows:
        assert row.held + row.lent <= max(row.nominal, row.held)
        assert row.borrowed == max(0, row.held - row.nominal)
        own = [one for one in status.replicas if one.tenant == row.tenant]  # type: ignore[attr-defined]
        assert row.held == sum(one.gpus for one in own if not one.is_draining)
        assert row.draining == sum(one.gpus for one in own if one.is_draining)
        waits = [one for one in status.waiting if one.tenant == row.tenant]  # type: ignore[attr-defined]
        assert row.waiting == sum(one.gpus for one in waits)
        assert all(one.reason for one in (*own, *waits))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    limits = st.one_of(st.none(), st.integers(0, 4))
    tenants = [
        Tenant(name, {"h100": Quota(draw(st.integers(0, 4)), draw(limits), draw(limits))}) for name in "ab"
    ]
    nodes = [
        GpuNode(f"n{number}", "h100", draw(st.integers(1, 4))) for number in range(draw(st.integers(1, 3)))
    ]
    return Fleet(rules(*tenants), nodes, Random(draw(st.integers(0, 2**32))))


@settings(max_examples=200, deadline=None)
@given(fleets(), st.integers(1, 30))
def test_nothing_runs_where_it_was_not_admitted_and_no_gpu_is_given_twice(fleet: Fleet, steps: int) -> None:
    for step in range(steps):
        fleet.want()
        for _ in range(fleet.rng.randint(1, 3)):
            fleet.round()
            fleet.pass_time(fleet.rng.choice([0.25, 50.0, 200.0]))
        if fleet.rng.random() < 0.1 and len(fleet.nodes) > 1:
            fleet.nodes.pop(fleet.rng.randrange(len(fleet.nodes)))
        elif fleet.rng.random() < 0.1:
            fleet.nodes.append(GpuNode(f"new{step}", "h100", fleet.rng.randint(1, 4)))
    fleet.settle()


@settings(max_examples=200, deadline=None)
@given(fleets(), st.integers(1, 8))
def test_steady_targets_come_to_rest_within_a_few_starts_and_drains(fleet: Fleet, changes: int) -> None:
    for _ in range(changes):
        fleet.want()
        fleet.starts.clear()
        fleet.drains.clear()
        fleet.settle()
        assert all(count <= 2 for count in fleet.drains.values()), fleet.drains
        assert all(count <= 3 for count in fleet.starts.values()), fleet.starts
        assert not fleet.shares.promised, "promised GPUs that nobody frees"
