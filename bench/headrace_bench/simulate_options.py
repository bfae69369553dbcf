"""The options of `headrace simulate`, and the scenario that they make."""

from __future__ import annotations

import argparse

from headrace.errors import CallerError
from headrace_bench.scenario import STUDY_SLO, Scenario
from headrace_bench.slo import Slo
from headrace_bench.timing_profile import DEFAULT_PROFILE, TimingProfile, read_profile, with_cache
from headrace_bench.trace import read_trace, truncate
from headrace_router.policies import POLICIES

DESCRIPTION = """Replay a trace on a simulated fleet, in virtual time.

The router, its policies and the simulated engine are those of production; only the sockets are missing. Prints
latencies, hit rate, goodput and imbalance beside what no routing can beat: the hit rates of one infinite shared cache
and of one pooled LRU cache of the fleet's size. Equal options give equal output."""

EXAMPLES = """examples:
  headrace simulate --trace conversation.jsonl.gz --replicas 8 --policy delay --speed 2
  headrace simulate --trace conversation.jsonl.gz --replicas 8 --compare all --utilisation 0.8
  headrace simulate --trace conversation.jsonl.gz --replicas 2 --profile cpu.json --json out.json"""

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option, in groups."""
    load = parser.add_argument_group("load")
    load.add_argument(
        "--trace", required=True, metavar="FILE", help="Mooncake (JSON lines) or Azure (CSV), may be gzipped"
    )
    load.add_argument("--requests", type=int, metavar="N", help="the first N of the trace (default: all)")
    load.add_argument("--speed", type=float, metavar="X", help="of the trace's arrivals (default 1)")
    load.add_argument(
        "--utilisation",
        type=float,
        metavar="U",
        help="instead of --speed: as fast as keeps a fleet with one pooled cache busy for this share of its time",
    )
    load.add_argument(
        "--jitter",
        type=float,
        metavar="S",
        help="spread arrivals, in the trace's time (default: its clock's step)",
    )
    load.add_argument(
        "--seed", type=int, default=0, metavar="K", help="moves arrivals within the jitter (default 0)"
    )
    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--replicas", type=int, required=True, metavar="N")
    fleet.add_argument("--policy", choices=sorted(POLICIES), default=_default_policy())
    fleet.add_argument(
        "--compare", metavar="P,P,…|all", help="several policies on the same requests: a table and a plot"
    )
    fleet.add_argument(
        "--cache-tokens", type=int, metavar="N", help="KV cache of one replica (default: the profile's)"
    )
    fleet.add_argument(
        "--profile",
        metavar="FILE",
        help="engine and timing, see `headrace calibrate` (default: that of the study)",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--slo-ttft", type=float, metavar="S", help="objectives for goodput (default 2)")
    report.add_argument("--slo-itl", type=float, metavar="S", help="a request's mean ITL (default 0.04)")
    report.add_argument("--slo-e2e", type=float, metavar="S", help="(default: none)")
    report.add_argument("--json", metavar="OUT", help="write the numbers to this file")
    report.add_argument(
        "--plot", metavar="STEM", help="write STEM.png and STEM.html (default with --compare: simulation)"
    )


def scenario(args: argparse.Namespace) -> tuple[TimingProfile, Scenario]:
    """What the options ask for. Raises `CallerError` and its kin on what cannot be."""
    if args.speed is not None and args.utilisation is not None:
        raise CallerError("--speed and --utilisation both set the speed; choose one")
    bounds = (
        ("--replicas", args.replicas, 1, 1024),
        ("--requests", args.requests, 1, 10_000_000),
        ("--speed", args.speed, 1e-6, 1e6),
        ("--utilisation", args.utilisation, 1e-3, 100),
        ("--jitter", args.jitter, 0, 86_400),
        ("--cache-tokens", args.cache_tokens, 1, 10**12),
    )
    for name, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            raise CallerError(f"{name} must be {low}..{high}, got {value}")
    profile = read_profile(args.profile) if args.profile else DEFAULT_PROFILE
    engine = profile.engine
    if args.cache_tokens is not None:
        engine = with_cache(engine, args.cache_tokens)
    asked = Scenario(
        records=truncate(read_trace(args.trace), args.requests),
        engine=engine,
        num_replicas=args.replicas,
        speed=args.speed or 1.0,
        jitter_s=args.jitter,
        slo=Slo(
            ttft_s=STUDY_SLO.ttft_s if args.slo_ttft is None else args.slo_ttft,
            itl_s=STUDY_SLO.itl_s if args.slo_itl is None else args.slo_itl,
            e2e_s=args.slo_e2e,
        ),
    )
    return profile, asked if args.utilisation is None else asked.at_utilisation(args.utilisation)


def policies(args: argparse.Namespace) -> list[str]:
    """The policies to run, in the order asked for. Raises `CallerError` on an unknown one."""
    if not args.compare:
        return [args.policy]
    if args.compare == ALL:
        return list(POLICIES)
    names = [name.strip() for name in args.compare.split(",") if name.strip()]
    for name in names:
        if name not in POLICIES:
            raise CallerError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}")
    if not names:
        raise CallerError(f"--compare names no policy; there are {', '.join(POLICIES)}")
    return list(dict.fromkeys(names))


def _default_policy() -> str:
    return "delay" if "delay" in POLICIES else "least_loaded"
