"""Request routers in a plain Ray Serve LLM application: ours, Serve's default, Ray Serve LLM's own for prefixes.

    python -m headrace_bench.serve_routers            # one round, about 5 minutes; writes results/serve_routers.*
    python -m headrace_bench.serve_routers --first 1  # one more

One deployment of two vLLM replicas, each on a core of its own, with KV caches that hold the users' conversations
together but not each alone: the load of `headrace_bench.real_policies`. For every contender the deployment is given its
router and a new ingress, whose handle then has it; the engines stay, and every run has text of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from headrace_bench.load import run_load
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_driver import LoadJob
from headrace_bench.load_probe import probe
from headrace_bench.load_summary import Distribution
from headrace_bench.peers import REPOSITORY
from headrace_bench.real_replica import MODEL
from headrace_bench.real_run import Workload, asked_of
from headrace_bench.relay_report import machine
from headrace_bench.serve_ground import Ground, llm_config, serve_ground

RESULTS = REPOSITORY / "bench" / "results"
KV_BYTES = 150_000_000  # as in `real_policies`
OURS = "headrace.serve.DelayAwareRequestRouter"
CONTENDERS: Mapping[str, str | None] = {
    OURS: "headrace.serve.DelayAwareRequestRouter",
    "PowerOfTwoChoicesRequestRouter (Serve's default)": None,
    "PrefixCacheAffinityRouter (Ray Serve LLM)": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
}


@dataclass(frozen=True, slots=True)
class RouterRun:
    """One contender, one round. Tokens are of the whole run, latencies of what was sent after the settling."""

    contender: str
    round: int
    requests: int
    failed: int
    errors: tuple[str, ...]
    ttft_s: Distribution
    e2e_s: Distribution
    prompt_tokens: int
    cached_tokens: int

    @property
    def computed_per_request(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.requests


def engines(router: str | None) -> Any:
    """The deployment of two replicas with this request router; None: Serve's default."""
    from ray.serve.config import RequestRouterConfig
    from ray.serve.llm import build_llm_deployment

    from headrace_bench.core_bound_server import CoreBoundServer

    chosen = RequestRouterConfig() if router is None else RequestRouterConfig(request_router_class=router)
    config = llm_config(MODEL, None, {"num_replicas": 2}, KV_BYTES)
    return build_llm_deployment(
        config, deployment_cls=CoreBoundServer, override_serve_options={"request_router_config": chosen}
    )


def front(handle: Any) -> Any:
    """Ray Serve LLM's own ingress before that deployment."""
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    config = llm_config(MODEL, None, {"num_replicas": 2}, KV_BYTES)
    options = {**OpenAiIngress.get_deployment_options([config]), "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(make_fastapi_ingress(OpenAiIngress), **options).bind(
        llm_deployments={MODEL: handle}, model_cards={MODEL: to_model_metadata(MODEL, config)}
    )


def deploy(router: str | None) -> None:
    """Give the engines this router and a new ingress."""
    from ray import serve

    if "front" in serve.status().applications:
        serve.delete("front")
    handle = serve.run(engines(router), name="engines", route_prefix=None)
    serve.run(front(handle), name="front", route_prefix="/")


async def _calibration(url: str) -> Any:
    client = LoadClient(Target.parse(url))
    try:
        return (await probe(client, MODEL, "chat")).calibration
    finally:
        client.close()


def measure(args: argparse.Namespace, measured: Callable[[RouterRun], None]) -> None:
    """Every contender once in each round; `measured` hears of each run."""
    workload = Workload(duration_s=args.duration, settle_s=args.settle)
    names = [name for name in CONTENDERS if not args.only or any(one in name for one in args.only)]
    with serve_ground() as ground:
        calibration = None
        for number in range(args.rounds):
            shift = (number + args.first) % len(names)
            for place, name in enumerate([*names[shift:], *names[:shift]]):
                began_s = time.monotonic()
                deploy(CONTENDERS[name])
                _say(f"{name}: deployed in {time.monotonic() - began_s:.0f} s")
                calibration = calibration or asyncio.run(_calibration(ground.url("")))
                seed = 1 + (number + args.first) * len(names) + place
                run = _run(ground, workload, calibration, name, number + args.first, seed=seed)
                measured(run)
                _say(
                    f"{name}: TTFT mean {run.ttft_s.mean:.3f} p50 {run.ttft_s.p50:.3f} s, "
                    f"{run.computed_per_request:.0f} tokens computed a request, {run.failed} failed"
                )


def _run(
    ground: Ground, workload: Workload, calibration: Any, name: str, number: int, *, seed: int
) -> RouterRun:
    job = LoadJob(
        target=Target.parse(ground.url("")),
        model=MODEL,
        conversations=workload.conversations(calibration),
        users=workload.users,
        ignore_eos=True,
        body={"temperature": 0},
        seed=seed,
        duration_s=workload.duration_s,
        timeout_s=60.0,
    )
    outcomes = run_load(job, 1).outcomes
    asked = asked_of(outcomes, workload.settle_s)
    measured = [one for one in asked if one.measured]
    ttft_s = Distribution.of(one.ttft_s for one in measured)
    e2e_s = Distribution.of(one.e2e_s for one in measured)
    failures = [one for one in outcomes if one.error is not None]
    if ttft_s is None or e2e_s is None:
        raise SystemExit(f"{name} answered nothing: {failures[:1]}")
    return RouterRun(
        contender=name,
        round=number,
        requests=len(asked),
        failed=len(failures),
        errors=tuple(sorted({f"{one.error}: {one.detail}" for one in failures}))[:3],
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        prompt_tokens=sum(one.prompt_tokens for one in asked),
        cached_tokens=sum(one.cached_tokens for one in asked),
    )


def page(runs: list[dict[str, Any]], heads: list[str]) -> str:
    """A table of the medians of the rounds."""
    lines = [
        "# Request routers in a Ray Serve LLM application",
        "",
        *heads,
        "",
        "| router | TTFT mean s | x | p50 s | p90 s | e2e mean s | prompt tokens computed a request | x | hit rate "
        "| requests | failed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["contender"] for run in runs):
        mine = [run for run in runs if run["contender"] == name]
        cached, prompts = (sum(run[key] for run in mine) for key in ("cached_tokens", "prompt_tokens"))
        computed = [_computed(run) for run in mine]
        cells = [
            name,
            _spread([run["ttft_s"]["mean"] for run in mine], 3),
            _times(runs, name, _mean_ttft),
            _spread([run["ttft_s"]["p50"] for run in mine], 3),
            _spread([run["ttft_s"]["p90"] for run in mine], 3),
            _spread([run["e2e_s"]["mean"] for run in mine], 2),
            _spread(computed, 0),
            _times(runs, name, _computed),
            f"{cached / prompts:.1%}",
            str(sum(run["requests"] for run in mine)),
            str(sum(run["failed"] for run in mine)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "How to read it: the median of the rounds (smallest..largest). `x`: over ours in the same round. Tokens "
        "computed: prompt tokens that no cache had, by the engines' own usage, over the whole run, per request.",
    ]
    return "\n".join(lines) + "\n"


def _mean_ttft(run: Mapping[str, Any]) -> float:
    return float(run["ttft_s"]["mean"])


def _computed(run: Mapping[str, Any]) -> float:
    return float(run["prompt_tokens"] - run["cached_tokens"]) / float(run["requests"])


def _times(runs: list[dict[str, Any]], name: str, figure: Callable[[Mapping[str, Any]], float]) -> str:
    """This router's figure over ours, round by round."""
    ours = {run["round"]: figure(run) for run in runs if run["contender"] == OURS}
    mine = {run["round"]: figure(run) for run in runs if run["contender"] == name}
    return _spread([mine[number] / ours[number] for number in sorted(mine.keys() & ours.keys())] or [1.0], 2)


def _spread(values: list[float], digits: int) -> str:
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    usual = Workload()
    options = argparse.ArgumentParser(prog="headrace_bench.serve_routers")
    options.add_argument("--rounds", type=int, default=1, metavar="N")
    options.add_argument("--first", type=int, default=0, metavar="N", help="number of the first round")
    options.add_argument("--duration", type=float, default=usual.duration_s, metavar="S", help="of one run")
    options.add_argument("--settle", type=float, default=usual.settle_s, metavar="S")
    options.add_argument(
        "--only", action="append", metavar="NAME", help="part of a router's name; may be repeated"
    )
    options.add_argument("--out", type=Path, default=RESULTS / "serve_routers", metavar="STEM")
    args = options.parse_args()
    path = args.out.with_suffix(".json")
    # Rounds of earlier calls count on: one call is as long as one round.
    runs = json.loads(path.read_text())["runs"] if args.first and path.exists() else []

    def measured(run: RouterRun) -> None:
        runs.append({**asdict(run), "errors": list(run.errors)})
        path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(runs, _heads(args, runs)))

    measure(args, measured)
    print(page(runs, _heads(args, runs)))
    return 0


def _heads(args: argparse.Namespace, runs: list[dict[str, Any]]) -> list[str]:
    workload = Workload(duration_s=args.duration, settle_s=args.settle)
    return [
        f"- date: {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}",
        f"- machine: {machine()}; Serve and load share the replicas' two cores",
        f"- command: python -m headrace_bench.serve_routers {' '.join(sys.argv[1:])}".rstrip(),
        f"- load: {workload.users} users, conversations of {workload.turns} turns of {workload.turn_tokens[0]}.."
        f"{workload.turn_tokens[1]} tokens after one of {workload.system_prompts} system prompts of "
        f"{workload.system_tokens}; answers of {workload.answer_tokens}; runs of {workload.duration_s:g} s, latencies "
        f"after the first {workload.settle_s:g} s; rounds: {1 + max(run['round'] for run in runs)}",
    ]


if __name__ == "__main__":
    sys.exit(main())
