"""`headrace calibrate`: fit a timing profile to a real engine, for `headrace simulate` and `backend: simulated`."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from headrace.config import SimulatedEngine
from headrace.errors import CallerError
from headrace_bench.bench_options import headers
from headrace_bench.calibration import Fit, fit_steps
from headrace_bench.calibration_load import ProbeLoad, Seen, observe
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_probe import ServerFacts, probe
from headrace_bench.timing_profile import TimingProfile

DESCRIPTION = """Fit a timing profile to a real engine.

Without --url: the fleet that runs on this machine; its replicas report every step, and tell their cache. With --url:
any OpenAI-compatible server, one engine (not a gateway before several); --load adds the address of its load reports
where it is a Headrace replica. Takes a minute or so, during which the engine should have nothing else to do."""

EXAMPLES = """examples:
  headrace calibrate --out cpu.json
  headrace calibrate --url http://127.0.0.1:8000 --cache-tokens 11000 --out gpu.json
  headrace simulate --trace conversation.jsonl.gz --replicas 2 --profile cpu.json"""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an engine is, and what is known of it beforehand."""

    url: str
    load: tuple[str, ...] = ()
    block_size: int | None = None
    num_blocks: int | None = None
    max_model_len: int | None = None


def add_parser(subparsers: Any) -> None:
    """Join the `headrace` command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a timing model to a real engine",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="http://HOST:PORT, with or without /v1 (default: the running fleet)")
    parser.add_argument("--model", help="served name; may be left out where there is one")
    parser.add_argument("--api-key", help="default: the environment's OPENAI_API_KEY")
    parser.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="may be repeated"
    )
    parser.add_argument(
        "--load", action="append", default=[], metavar="tcp://…", help="load reports; may be repeated"
    )
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=1024, metavar="N", help="longest (default 1024)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="most answers at once (default 8)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default 3)")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per KV block, where the engine does not say"
    )
    parser.add_argument(
        "--cache-tokens", type=int, metavar="N", help="KV cache, where the engine does not say"
    )
    parser.add_argument(
        "--max-batched-tokens", type=int, metavar="N", help="of one step, as the engine is configured"
    )
    parser.add_argument("--name", help="of the profile (default: the model's)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the profile, JSON")


def run(args: argparse.Namespace) -> int:
    """0. Raises `HeadraceError` where nothing answers or too little was seen."""
    for name, value, low, high in (
        ("--max-prompt-tokens", args.max_prompt_tokens, 32, 1_000_000),
        ("--concurrency", args.concurrency, 1, 1024),
        ("--repeats", args.repeats, 1, 100),
    ):
        if not low <= value <= high:
            raise CallerError(f"{name} must be {low}..{high}, got {value}")
    screen = Console(stderr=True)
    source = Source(args.url, tuple(args.load)) if args.url else _running_fleet(args.model)
    load = ProbeLoad(
        args.max_prompt_tokens,
        tuple(count for count in (1, 2, 4, 8, 16, 32, 64) if count <= args.concurrency) or (1,),
        args.repeats,
    )
    facts, seen = asyncio.run(
        _observe(Target.parse(source.url, headers(args)), args.model, source, load, screen)
    )
    fit = fit_steps(seen.steps)
    kind = "its own reports" if seen.reported else "the client's clock"
    origin = (
        f"fitted to {fit.steps} steps of {facts.model} by {kind}; {fit.left_out} left out, "
        f"median error {fit.median_error:.1%}"
    )
    profile = TimingProfile(args.name or facts.model, origin, _engine(args, source, fit, seen))
    try:
        profile.write(Path(args.out))
    except OSError as error:
        raise CallerError(f"the profile cannot be written: {error}") from error
    timing = fit.timing
    screen.print(f"{args.out}: {origin}", highlight=False, soft_wrap=True)
    screen.print(
        f"a step takes {timing.step_s * 1e3:.3f} ms + {timing.prefill_token_s * 1e6:.2f} µs per prompt token + "
        f"{timing.decode_sequence_s * 1e3:.3f} ms per answer + {timing.context_token_s * 1e9:.2f} ns per context token",
        highlight=False,
        soft_wrap=True,
    )
    return 0


async def _observe(
    target: Target, model: str | None, source: Source, load: ProbeLoad, screen: Console
) -> tuple[ServerFacts, Seen]:
    client = LoadClient(target)
    try:
        facts = await probe(client, model, "chat")
        with screen.status("calibrating") as status:
            seen = await observe(
                client,
                facts,
                load,
                source.load,
                lambda done: status.update(f"calibrating: {done}/{load.rounds}"),
            )
    finally:
        client.close()
    return facts, seen


def _engine(args: argparse.Namespace, source: Source, fit: Fit, seen: Seen) -> SimulatedEngine:
    """What was fitted, what the engine said, what the options say; the rest as a simulated engine has it."""
    defaults = SimulatedEngine()
    block_size = args.block_size or source.block_size or defaults.block_size
    num_blocks = source.num_blocks or defaults.num_blocks
    if args.cache_tokens:
        num_blocks = max(1, args.cache_tokens // block_size)
    return SimulatedEngine(
        block_size=block_size,
        num_blocks=num_blocks,
        max_batched_tokens=args.max_batched_tokens or defaults.max_batched_tokens,
        max_model_len=source.max_model_len or defaults.max_model_len,
        step_s=fit.timing.step_s,
        prefill_token_s=fit.timing.prefill_token_s,
        decode_sequence_s=fit.timing.decode_sequence_s,
        context_token_s=fit.timing.context_token_s,
    )


def _running_fleet(model: str | None) -> Source:
    """The fleet that runs on this machine. Raises `CallerError` where there is none, or several."""
    from headrace.fleet import cluster, run_file

    runs = run_file.running()
    if len(runs) != 1:
        found = ", ".join(run.url for run in runs) or "none"
        raise CallerError(f"one fleet must run on this machine, found: {found}; or give --url")
    cluster.join(runs[0].ray_address, runs[0].auth_token, timeout_s=15.0)
    import ray

    from headrace.fleet.replica_host import NAMESPACE, controller_name

    try:
        controller = ray.get_actor(controller_name(runs[0].fleet), namespace=NAMESPACE)
        membership = ray.get(controller.watch.remote("", -1, 5.0), timeout=15.0)
    except (ValueError, ray.exceptions.RayError) as error:
        raise CallerError(f"the fleet {runs[0].fleet!r} does not answer: {error}") from error
    finally:
        ray.shutdown()
    replicas = [replica for replica in membership.replicas if model in (None, replica.model)]
    if not replicas:
        raise CallerError(f"no replica of {model!r} is in the fleet {runs[0].fleet!r}")
    one = replicas[0]
    endpoints = tuple(replica.endpoints.load for replica in replicas if replica.endpoints.load)
    return Source(runs[0].url, endpoints, one.block_size, one.num_blocks, one.max_model_len)
