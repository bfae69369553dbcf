"""Two tenants on a fixed number of GPUs: each pool follows its own load, `gpu_quota.allocate` says who gets GPUs.

    python -m headrace_bench.scaling_quota

Writes bench/results/scaling_quota.md. In three phases of ten minutes first *batch* is busy and borrows what *chat* does
not use, then *chat* is busy too and reclaims its own, then *batch* is quiet and *chat* may borrow. About 10 s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from statistics import fmean

from headrace.fleet.gpu_quota import allocate
from headrace.fleet.gpu_quota_spec import Claim, GpuNode, Holding, Quota, Spot, Tenant
from headrace.fleet.scaling_spec import ScalingSpec
from headrace_bench.policy_study import HOME
from headrace_bench.scaled_replicas import ScaledReplica, Stage
from headrace_bench.scalers.ours import Ours
from headrace_bench.scaling_cells import ENGINE
from headrace_bench.scaling_fleet import ScalingSimulation
from headrace_bench.scaling_run import ScaledRun
from headrace_bench.scaling_sample import Bounds
from headrace_bench.scaling_workload import plan
from headrace_bench.trace import TraceRecord

KIND, NODE, GPUS = "gpu", "node-0", 8
PHASE_S = 600.0
COLD_START_S = 30.0
MIN_RUN_S = 120.0
SAMPLE_S = 120.0


@dataclass(frozen=True, slots=True)
class TenantLoad:
    """One tenant: its own GPUs, and requests per second in each phase."""

    name: str
    nominal: int
    rates: tuple[float, ...]

    def records(self, seed: int) -> list[TraceRecord]:
        """Poisson arrivals of one size, so that only the rates tell."""
        rng = Random(f"{self.name} {seed}")
        records = []
        for phase, rate in enumerate(self.rates):
            at_s = phase * PHASE_S + rng.expovariate(rate)
            while at_s < (phase + 1) * PHASE_S:
                records.append(TraceRecord(at_s, 1000, 150))
                at_s += rng.expovariate(rate)
        return records


TENANTS = (TenantLoad("chat", 5, (0.2, 1.5, 1.5)), TenantLoad("batch", 3, (1.6, 1.0, 0.2)))


class _TenantFleet(ScalingSimulation):
    """What its scaler asks for is only wanted; the GPUs' owner starts and drains."""

    tenant = ""
    wanted = 0
    serial: Iterator[int] = iter(())  # of its claims

    def _follow(self, target: int) -> None:
        self.wanted = target

    def admit(self, now_s: float) -> ScaledReplica:
        """One replica more."""
        (replica,) = self.fleet.start(1, now_s)
        self._at(now_s + COLD_START_S, self._ready, replica)
        return replica


@dataclass(frozen=True, slots=True)
class Moment:
    """Who held what, and who waited for what."""

    at_s: float
    tenant: str
    wanted: int
    held: int
    draining: int
    borrowed: int
    pending: tuple[str, ...]  # why those that are wanted do not run
    queued: int


@dataclass(slots=True)
class Sharing:
    """One run. Mutable; `run` it once."""

    seed: int = 0
    tenants: tuple[TenantLoad, ...] = TENANTS
    moments: list[Moment] = field(default_factory=list)
    reclaimed: list[tuple[float, str, str]] = field(default_factory=list)  # when, whose, why
    runs: dict[str, ScaledRun] = field(default_factory=dict)

    def run(self) -> None:
        """Let both fleets go in step, a second at a time."""
        fleets = {load.name: self._fleet(load) for load in self.tenants}
        held: dict[str, tuple[str, ScaledReplica]] = {}
        asked: dict[str, list[tuple[str, float]]] = {name: [] for name in fleets}
        for name, fleet in fleets.items():
            held |= {f"{name}-{next(fleet.serial)}": (name, replica) for replica in fleet.begun}
        until_s = len(self.tenants[0].rates) * PHASE_S
        for second in range(int(until_s)):
            now_s = second + 0.5
            for fleet in fleets.values():
                fleet.run_until(now_s)
            held = {key: one for key, one in held.items() if not one[1].is_gone}
            for name, fleet in fleets.items():
                mine = [one for owner, one in held.values() if owner == name and not one.is_draining]
                self._want(fleet, mine, asked[name], now_s)
            self._allocate(fleets, held, asked, now_s)
        for name, fleet in fleets.items():
            self.runs[name] = fleet.run()

    def _fleet(self, load: TenantLoad) -> _TenantFleet:
        bounds = Bounds(1, GPUS)
        fleet = _TenantFleet(
            plan(load.records(self.seed)),
            ENGINE,
            Ours(ScalingSpec(1, GPUS, cold_start_s=COLD_START_S)),
            bounds=bounds,
            cold_start_s=COLD_START_S,
            initial=1,
            seed=self.seed,
        )
        fleet.tenant, fleet.serial = load.name, count()
        return fleet

    def _want(
        self,
        fleet: _TenantFleet,
        mine: Sequence[ScaledReplica],
        asked: list[tuple[str, float]],
        now_s: float,
    ) -> None:
        """As many claims as replicas are wanted: what is beyond is given back, what is missing asked for."""
        spare = len(mine) - fleet.wanted
        if spare > 0:
            asked.clear()
            for replica in sorted(mine, key=lambda one: (one.is_ready, not one.is_idle, -one.asked_s))[
                :spare
            ]:
                fleet.fleet.drain(replica, now_s)
        missing = max(0, -spare)
        del asked[missing:]
        while len(asked) < missing:
            asked.append((f"{fleet.tenant}-{next(fleet.serial)}", now_s))

    def _allocate(
        self,
        fleets: dict[str, _TenantFleet],
        held: dict[str, tuple[str, ScaledReplica]],
        asked: dict[str, list[tuple[str, float]]],
        now_s: float,
    ) -> None:
        claims = [
            Claim(key, name, name, KIND, asked_at_s=one.asked_s, holding=_holding(one))
            for key, (name, one) in held.items()
            if not one.is_gone
        ]
        claims += [
            Claim(key, name, name, KIND, asked_at_s=asked_s)
            for name, waiting in asked.items()
            for key, asked_s in waiting
        ]
        tenants = [Tenant(load.name, {KIND: Quota(load.nominal)}) for load in self.tenants]
        said = allocate(tenants, [GpuNode(NODE, KIND, GPUS)], claims, now_s, MIN_RUN_S)
        owners = {claim.id: claim.tenant for claim in claims}
        for admission in said.admitted:
            name = owners[admission.claim_id]
            held[admission.claim_id] = (name, fleets[name].admit(now_s))
            asked[name] = [one for one in asked[name] if one[0] != admission.claim_id]
        for preemption in said.preempted:
            name, replica = held[preemption.claim_id]
            fleets[name].fleet.drain(replica, now_s)
            self.reclaimed.append((now_s, preemption.claim_id, preemption.reason))
        in_use = sum(not one.is_gone for _, one in held.values())
        assert in_use <= GPUS, f"{in_use} replicas on {GPUS} GPUs"
        if (now_s - 0.5) % SAMPLE_S == 0:
            for load in self.tenants:
                name = load.name
                mine = [one for owner, one in held.values() if owner == name and not one.is_gone]
                why = sorted({reason for key, reason in said.pending.items() if owners[key] == name})
                self.moments.append(
                    Moment(
                        now_s - 0.5,
                        name,
                        fleets[name].wanted,
                        len(mine),
                        sum(one.is_draining for one in mine),
                        max(0, len(mine) - load.nominal),
                        tuple(why),
                        fleets[name].num_queued,
                    )
                )


def _holding(replica: ScaledReplica) -> Holding:
    return Holding(
        (Spot(NODE, 1),),
        since_s=replica.asked_s,
        is_idle=replica.stage is Stage.READY and replica.is_idle,
        is_draining=replica.is_draining,
    )


def render(sharing: Sharing, command: str) -> str:
    """Markdown."""
    own = ", ".join(f"{load.name} {load.nominal}" for load in sharing.tenants)
    lines = [
        "# Two tenants on eight GPUs", "", f"`{command}`: seed {sharing.seed}. Own GPUs: {own}; cold start "
        f"{COLD_START_S:g} s, minimum run time {MIN_RUN_S:g} s; production's `decide` per pool and `allocate` each "
        "second, production's router and queue, the simulated engine of the scaling study.", "",
        "| s | tenant | wanted | holds | of that draining | borrowed | queued | why not more |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {one.at_s:.0f} | {one.tenant} | {one.wanted} | {one.held} | {one.draining} | {one.borrowed} "
        f"| {one.queued} | {'; '.join(one.pending)} |"
        for one in sharing.moments
    ]
    lines += ["", f"Reclaimed by draining: {len(sharing.reclaimed)} replicas.", ""]
    lines += [f"- {at_s:.0f} s: {claim}: {why}" for at_s, claim, why in sharing.reclaimed]
    lines += ["", "| tenant | phase | requests | answered | refused after a minute | mean TTFT s |"]
    lines += ["|---|---|---|---|---|---|"]
    for load in sharing.tenants:
        run = sharing.runs[load.name]
        for phase in range(len(load.rates)):
            begin_s, end_s = phase * PHASE_S, (phase + 1) * PHASE_S
            sent = sum(begin_s <= record.arrival_s < end_s for record in load.records(sharing.seed))
            answered = [one for one in run.answered if begin_s <= one.arrival_s < end_s]
            ttft_s = fmean(one.ttft_s for one in answered) if answered else 0.0
            lines.append(
                f"| {load.name} | {phase + 1} | {sent} | {len(answered)} | {sent - len(answered)} | {ttft_s:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.scaling_quota", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="(default 0)")
    parser.add_argument("--out", default=HOME / "results" / "scaling_quota.md", metavar="FILE")
    args = parser.parse_args(argv)
    sharing = Sharing(args.seed)
    sharing.run()
    Path(args.out).write_text(render(sharing, "python -m headrace_bench.scaling_quota"))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
