"""The options of `headrace bench`, and the plan that they make."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from typing import Any

from headrace.errors import CallerError
from headrace_bench.load import MAX_PROCESSES
from headrace_bench.prompt_text import Calibration
from headrace_bench.slo import Slo
from headrace_bench.trace import read_trace, rescale, truncate
from headrace_bench.workload import (
    MAX_REQUESTS,
    Conversation,
    Replay,
    Span,
    Synthetic,
    WorkloadError,
    mark_warm_up,
    plan_replay,
    plan_synthetic,
    start_poisson,
    start_when_free,
)

DEFAULT_USERS = 8
DEFAULT_REQUESTS = 100

DESCRIPTION = """Load an OpenAI-compatible server and measure it.

Prompts are made-up conversations, or the requests of --trace. They are sent in an open loop (--rate per
second; a trace without --rate or --users keeps its own times) or in a closed loop (--users at a time; the default)."""

EXAMPLES = """examples:
  headrace bench --url http://127.0.0.1:8000 --users 16 --requests 400
  headrace bench --url http://127.0.0.1:8000 --rate 4 --slo-ttft 1 --slo-tpot 0.05 --report out/
  headrace bench --url http://127.0.0.1:8000 --users 8 --turns 5 --system-prompts 4 --think 2
  headrace bench --url http://127.0.0.1:8000 --trace conversation.jsonl --speed 0.1 --token-scale 0.05"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option, in groups."""
    _add_target(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("workload"))
    _add_run(parser.add_argument_group("run"))
    _add_report(parser.add_argument_group("report"))


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", required=True, help="http://HOST:PORT, with or without /v1")
    group.add_argument("--model", help="served name; may be left out where the server serves one model")
    group.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    group.add_argument("--api-key", help="default: the environment's OPENAI_API_KEY")
    group.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="may be repeated"
    )
    group.add_argument("--session-header", metavar="NAME", help="send the conversation's id in this header")
    group.add_argument(
        "--body", metavar="JSON", help="more fields for every request, e.g. '{\"temperature\": 0}'"
    )
    group.add_argument("--no-stream", action="store_true", help="whole answers; TTFT and ITL cannot be seen")
    group.add_argument(
        "--ignore-eos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="answers of exactly the length asked for; auto: where the server is vLLM, SGLang or Headrace",
    )


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rate", type=float, metavar="R", help="open loop: conversations per second, Poisson")
    group.add_argument(
        "--users", type=int, metavar="C", help=f"closed loop: at a time (default {DEFAULT_USERS})"
    )
    group.add_argument(
        "--requests", type=int, metavar="N", help=f"measured (default {DEFAULT_REQUESTS}; a trace: all)"
    )
    group.add_argument(
        "--warmup", type=int, default=0, metavar="N", help="requests before these, not measured"
    )
    group.add_argument("--prompt-tokens", default="256", metavar="N|LOW:HIGH", help="per turn (default 256)")
    group.add_argument("--output-tokens", default="64", metavar="N|LOW:HIGH", help="per turn (default 64)")
    group.add_argument("--turns", type=int, default=1, metavar="N", help="per conversation (default 1)")
    group.add_argument(
        "--think", type=float, default=0.0, metavar="S", help="mean pause between turns, seconds"
    )
    group.add_argument(
        "--system-prompts", type=int, default=0, metavar="N", help="shared by the conversations"
    )
    group.add_argument("--system-tokens", type=int, default=512, metavar="N", help="of each (default 512)")
    group.add_argument(
        "--trace", metavar="FILE", help="Mooncake (JSON lines) or Azure (CSV) trace, may be gzipped"
    )
    group.add_argument("--speed", type=float, default=1.0, metavar="X", help="of the trace's arrivals")
    group.add_argument("--token-scale", type=float, default=1.0, metavar="X", help="of the trace's inputs")
    group.add_argument("--output-scale", type=float, default=1.0, metavar="X", help="of the trace's outputs")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longer prompts of a trace are cut")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="longer outputs of a trace are cut")
    group.add_argument("--seed", type=int, default=0, help="equal seeds send equal prompts")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--duration", type=float, default=300.0, metavar="S", help="send nothing later (default 300)"
    )
    group.add_argument("--timeout", type=float, default=120.0, metavar="S", help="per request (default 120)")
    group.add_argument("--processes", type=int, default=1, metavar="N", help="client processes (default 1)")


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--slo-ttft", type=float, metavar="S", help="objectives for goodput, seconds per request"
    )
    group.add_argument("--slo-itl", type=float, metavar="S", help="mean time between chunks")
    group.add_argument("--slo-tpot", type=float, metavar="S", help="time per output token")
    group.add_argument("--slo-e2e", type=float, metavar="S")
    group.add_argument("--json", metavar="OUT", help="write the numbers to this file")
    group.add_argument(
        "--report", metavar="DIR", help="write report.html, plots, report.json and requests.csv"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What the options ask for, once the server is known."""

    conversations: tuple[Conversation, ...]
    users: int | None  # None: open loop


def check(args: argparse.Namespace) -> None:
    """Raise `WorkloadError` on what cannot be, before anything is sent."""
    if args.rate is not None and args.users is not None:
        raise WorkloadError("--rate is an open loop and --users a closed one; choose one")
    bounds = (
        ("--users", args.users, 1, 10_000),
        ("--requests", args.requests, 1, MAX_REQUESTS),
        ("--warmup", args.warmup, 0, MAX_REQUESTS),
        ("--turns", args.turns, 1, 1000),
        ("--think", args.think, 0, 3600),
        ("--system-prompts", args.system_prompts, 0, 100_000),
        ("--system-tokens", args.system_tokens, 1, 10_000_000),
        ("--speed", args.speed, 1e-6, 1e6),
        ("--token-scale", args.token_scale, 1e-6, 1e3),
        ("--output-scale", args.output_scale, 1e-6, 1e3),
        ("--max-prompt-tokens", args.max_prompt_tokens, 1, 10_000_000),
        ("--max-output-tokens", args.max_output_tokens, 1, 10_000_000),
        ("--duration", args.duration, 0.1, 86_400),
        ("--timeout", args.timeout, 0.01, 86_400),
        ("--processes", args.processes, 1, MAX_PROCESSES),
    )
    for name, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            raise WorkloadError(f"{name} must be {low}..{high}, got {value}")
    if args.trace and (args.turns > 1 or args.system_prompts):
        raise WorkloadError(
            "--turns and --system-prompts make conversations up; a --trace brings its own prompts"
        )


def plan(args: argparse.Namespace, calibration: Calibration) -> Plan:
    """The conversations to run. Raises `WorkloadError`, `TraceError`."""
    if args.trace:
        wanted = None if args.requests is None else args.requests + args.warmup
        records = truncate(rescale(read_trace(args.trace), args.speed), wanted)
        replay = Replay(args.token_scale, args.output_scale, args.max_prompt_tokens, args.max_output_tokens)
        conversations = plan_replay(records, replay, calibration)
    else:
        spec = Synthetic(
            requests=(args.requests or DEFAULT_REQUESTS) + args.warmup,
            prompt_tokens=Span.parse(args.prompt_tokens),
            output_tokens=Span.parse(args.output_tokens),
            turns=args.turns,
            system_prompts=args.system_prompts,
            system_tokens=args.system_tokens,
            think_s=args.think,
        )
        conversations = plan_synthetic(spec, calibration, args.seed)
    users = args.users
    if args.rate is not None:
        conversations = start_poisson(conversations, args.rate, args.seed)
    elif users is not None or not args.trace:
        users = users or DEFAULT_USERS
        conversations = start_when_free(conversations)
    return Plan(mark_warm_up(conversations, args.warmup), users)


def objectives(args: argparse.Namespace) -> Slo:
    """Raises `CallerError`."""
    return Slo(args.slo_ttft, args.slo_itl, args.slo_tpot, args.slo_e2e)


def headers(args: argparse.Namespace) -> dict[str, str]:
    """Of every request. Raises `CallerError` on a header that is none."""
    pairs = {}
    for line in args.header:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise CallerError(f"--header {line!r} must look like 'NAME: VALUE'")
        pairs[name.strip().lower()] = value.strip()
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    if key and "authorization" not in pairs:
        pairs["authorization"] = f"Bearer {key}"
    return pairs


def extra_body(args: argparse.Namespace) -> dict[str, Any]:
    """Raises `CallerError` on what is no JSON object."""
    try:
        body = json.loads(args.body or "{}")
    except json.JSONDecodeError as error:
        raise CallerError(f"--body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise CallerError(f"--body must be a JSON object, got {args.body!r}")
    return body
