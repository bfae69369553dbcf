"""The options of `headrace simulate`, and the scenario that they make."""

from __future__ import annotations

import argparse

from headrace.errors import CallerError
from headrace_bench.handing_over import KV_TOKEN_BYTES, HandingOver
from headrace_bench.scaling_arms import scaler_names
from headrace_bench.scenario import STUDY_SLO, Scenario
from headrace_bench.slo import Slo
from headrace_bench.timing_profile import DEFAULT_PROFILE, TimingProfile, read_profile, with_cache
from headrace_bench.trace import read_trace, truncate
from headrace_router.disaggregation import DISAGGREGATIONS, PER_REQUEST, THRESHOLD_TOKENS
from headrace_router.policies import POLICIES

DESCRIPTION = """Replay a trace on a simulated fleet, in virtual time.

The router, its policies and the simulated engine are those of production; only the sockets are missing. Prints
latencies, hit rate, goodput and imbalance beside what no routing can beat: the hit rates of one infinite shared cache
and of one pooled LRU cache of the fleet's size. Equal options give equal output."""

EXAMPLES = """examples:
  headrace simulate --trace conversation.jsonl.gz --replicas 8 --policy delay --speed 2
  headrace simulate --trace conversation.jsonl.gz --replicas 8 --compare all --utilisation 0.8
  headrace simulate --trace conversation.jsonl.gz --replicas 2 --profile cpu.json --json out.json
  headrace simulate --trace conversation.jsonl.gz --pools 4P+4D --disaggregation threshold --speed 2
  headrace simulate --trace conversation.jsonl.gz --replicas 8 --flexible --speed 2
  headrace simulate --trace conversation.jsonl.gz --autoscale 2:20 --cold-start 90 --scaler headrace,kpa,fixed"""

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
    fleet.add_argument("--replicas", type=int, metavar="N", help="(default: those of --pools)")
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
    _add_handing_over(parser.add_argument_group("prefill and decode apart"))
    scaling = parser.add_argument_group("autoscaling")
    scaling.add_argument(
        "--autoscale", metavar="MIN:MAX", help="scale the fleet; --replicas is then what it starts with"
    )
    scaling.add_argument("--cold-start", type=float, metavar="S", help="of a replica (default 60)")
    scaling.add_argument(
        "--scaler",
        metavar="NAME,…|all",
        help="headrace (default), fixed (--replicas), or those of others with their defaults: "
        f"{', '.join(name for name in scaler_names() if name not in ('headrace', 'fixed'))}",
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
    handing_over = _handing_over(args)
    num_replicas = args.replicas
    if num_replicas is None and args.autoscale:
        num_replicas = 1  # until the load has been looked at
    if num_replicas is None:
        if handing_over is None or not handing_over.pools:
            raise CallerError("how many replicas? --replicas 8, or --pools 4P+4D")
        num_replicas = len(handing_over.roles(None))
    bounds = (
        ("--replicas", num_replicas, 1, 1024),
        ("--requests", args.requests, 1, 10_000_000),
        ("--speed", args.speed, 1e-6, 1e6),
        ("--utilisation", args.utilisation, 1e-3, 100),
        ("--jitter", args.jitter, 0, 86_400),
        ("--cache-tokens", args.cache_tokens, 1, 10**12),
        ("--cold-start", args.cold_start, 0, 86_400),
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
        num_replicas=num_replicas,
        speed=args.speed or 1.0,
        jitter_s=args.jitter,
        slo=Slo(
            ttft_s=STUDY_SLO.ttft_s if args.slo_ttft is None else args.slo_ttft,
            itl_s=STUDY_SLO.itl_s if args.slo_itl is None else args.slo_itl,
            e2e_s=args.slo_e2e,
        ),
        handing_over=handing_over,
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


def _add_handing_over(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pools", metavar="4P+4D", help="prefill, decode and unified (U) replicas that hand prompts over"
    )
    group.add_argument(
        "--flexible", action="store_true", help="every replica may take either half: --pools 8U in short"
    )
    group.add_argument(
        "--disaggregation", choices=DISAGGREGATIONS, help=f"who decides (default {PER_REQUEST})"
    )
    group.add_argument(
        "--threshold", type=int, metavar="N", help=f"uncached tokens (default {THRESHOLD_TOKENS})"
    )
    group.add_argument("--bandwidth", type=float, metavar="B", help="bytes/s of a link (default 25e9)")
    group.add_argument(
        "--kv-bytes-per-token", type=float, metavar="B", help=f"of keys and values (default {KV_TOKEN_BYTES})"
    )
    group.add_argument("--transfer-latency", type=float, metavar="S", help="(default 0.005)")


def _handing_over(args: argparse.Namespace) -> HandingOver | None:
    """None where neither --pools nor --flexible asks for it."""
    details = {
        "disaggregation": args.disaggregation,
        "threshold_tokens": args.threshold,
        "bandwidth": args.bandwidth,
        "kv_token_bytes": args.kv_bytes_per_token,
        "latency_s": args.transfer_latency,
    }
    given = {name: value for name, value in details.items() if value is not None}
    if not args.pools and not args.flexible:
        if given:
            raise CallerError("nobody can hand prompts over; add --flexible or --pools 4P+4D")
        return None
    bounds = (
        ("--threshold", args.threshold, 0, 10**9),
        ("--bandwidth", args.bandwidth, 1.0, 1e15),
        ("--kv-bytes-per-token", args.kv_bytes_per_token, 1.0, 1e9),
        ("--transfer-latency", args.transfer_latency, 0.0, 60.0),
    )
    for name, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            raise CallerError(f"{name} must be {low:g}..{high:g}, got {value:g}")
    return HandingOver(pools=args.pools or "", **given)


def _default_policy() -> str:
    return "delay" if "delay" in POLICIES else "least_loaded"
