"""`headrace bench`: load a server, print what it did, write a report."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.errors import CallerError
from headrace_bench import bench_options
from headrace_bench.load import run_load
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_driver import Counts, LoadJob
from headrace_bench.load_plots import require_matplotlib
from headrace_bench.load_probe import ServerFacts, probe
from headrace_bench.load_report import Report, print_report, write_folder, write_json
from headrace_bench.load_summary import summarise

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it. What had ended by then is reported all the same."""

PLAIN_LINE_S = 5.0
"""Where the screen is no terminal, progress is a line this often."""

HIDDEN = frozenset({"api_key", "header", "command", "run"})
"""Options that stay out of reports: keys, and what argparse adds for the command itself."""


def add_parser(subparsers: Any) -> None:
    """Join the `headrace` command."""
    parser = subparsers.add_parser(
        "bench",
        help="load an OpenAI-compatible server and measure it",
        description=bench_options.DESCRIPTION,
        epilog=bench_options.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # so that a key is recognised and left out of reports
    )
    bench_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0 when a measured request succeeded, else 1; 130 after Ctrl-C. Raises `HeadraceError` before the load begins."""
    bench_options.check(args)
    slo = bench_options.objectives(args)
    body = bench_options.extra_body(args)
    target = Target.parse(args.url, bench_options.headers(args))
    if args.report:
        require_matplotlib()
    screen = Console(stderr=True)
    facts = uvloop.run(_probe(target, args, body))
    plan = bench_options.plan(args, facts.calibration)
    job = LoadJob(
        target=target,
        model=facts.model,
        conversations=plan.conversations,
        users=plan.users,
        endpoint=args.endpoint,
        streamed=not args.no_stream,
        ignore_eos=facts.ignore_eos if args.ignore_eos == "auto" else args.ignore_eos == "yes",
        session_header=args.session_header,
        body=body,
        seed=args.seed,
        duration_s=args.duration,
        timeout_s=args.timeout,
    )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with _progress(screen, sum(len(conversation.turns) for conversation in plan.conversations)) as progress:
        done = run_load(job, args.processes, progress)
    report = Report(
        command=_command(),
        started=started,
        setting=_setting(args, facts, job),
        summary=summarise(done.outcomes, slo),
        slo=slo,
        clients=done.clients,
        dropped=done.dropped,
        stopped=done.stopped,
    )
    print_report(report, Console())
    try:
        if args.json:
            write_json(report, Path(args.json))
        if args.report:
            screen.print(f"report: {write_folder(report, done.outcomes, Path(args.report))}", highlight=False)
    except OSError as error:
        raise CallerError(f"the report cannot be written: {error}") from error
    if done.stopped:
        return INTERRUPTED
    return 0 if report.summary.succeeded else 1


async def _probe(target: Target, args: argparse.Namespace, body: dict[str, Any]) -> ServerFacts:
    client = LoadClient(target)
    try:
        return await probe(client, args.model, args.endpoint, args.timeout, body)
    finally:
        client.close()


def _setting(args: argparse.Namespace, facts: ServerFacts, job: LoadJob) -> dict[str, Any]:
    options = {
        name: value for name, value in vars(args).items() if name not in HIDDEN and not callable(value)
    }
    return options | {
        "model": facts.model,
        "ignore_eos": job.ignore_eos,
        "users": job.users,
        "tokens_per_word": round(facts.calibration.tokens_per_word, 4),
        "overhead_tokens": round(facts.calibration.overhead_tokens, 1),
        "system_tokens_added": round(facts.calibration.system_tokens, 1),
        "turn_tokens_added": round(facts.calibration.turn_tokens, 1),
        "calibrated_by": facts.calibration.source,
    }


def _command() -> str:
    """As typed, without keys."""
    words = ["headrace", *sys.argv[1:]]
    for number, word in enumerate(words):
        for option in ("--api-key", "--header"):
            if word == option and number + 1 < len(words):
                words[number + 1] = "***"
            elif word.startswith(f"{option}="):
                words[number] = f"{option}=***"
    return shlex.join(words)


@contextmanager
def _progress(screen: Console, requests: int) -> Iterator[Callable[[Counts], None]]:
    """A bar on a terminal, now and then a line elsewhere."""
    if not screen.is_terminal:
        yield _plain_progress(screen, requests)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=requests)
        yield lambda counts: bar.update(task, completed=counts.ended, description=_words(counts))


def _plain_progress(screen: Console, requests: int) -> Callable[[Counts], None]:
    began_s = time.monotonic()
    told_s = began_s

    def tell(counts: Counts) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= PLAIN_LINE_S:
            told_s = now_s
            done = f"{counts.ended}/{requests}"
            screen.print(
                f"{now_s - began_s:.0f} s: {done}, {_words(counts)}", highlight=False, soft_wrap=True
            )

    return tell


def _words(counts: Counts) -> str:
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.in_flight} in flight, {counts.output_tokens} tokens{failed}"
