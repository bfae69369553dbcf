"""`headrace route`: the gateway alone, in front of servers that already run. No Ray, no vLLM, no torch."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from headrace.config import Gateway, node
from headrace.errors import ConfigError
from headrace.gateway.group import GatewayGroup
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace.gateway.static_fleet import StaticFleet
from headrace_router.policies import POLICIES


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser(
        "route", help="run the gateway alone, in front of servers that already run"
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headrace route`."""
    parser.add_argument(
        "--backend", action="append", required=True, metavar="URL", help="a server; repeat for more"
    )
    parser.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        default=Gateway().policy,
        help="how to choose; default %(default)s",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    parser.add_argument(
        "--model", help="route only this model; also its name when a server has no /v1/models"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with the model's tokenizer.json, for policies that know prompts by their tokens; "
        "without it they know them by their text",
    )
    parser.add_argument("--api-key", help="sent to the servers instead of the client's own key")
    parser.add_argument(
        "--no-access-log", action="store_true", help="write no JSON line per request to stderr"
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests get; default 30",
    )
    parser.add_argument(
        "--gateways", type=int, default=1, metavar="N", help="processes that share the port; default 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the policies that draw lots; default 0")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises HeadraceError when it cannot start."""
    if args.drain_timeout < 0:
        raise ConfigError(f"--drain-timeout is {args.drain_timeout:g}; it must be at least 0")
    source = StaticFleet(args.backend, api_key=args.api_key, model=args.model)
    config = node(
        Gateway,
        {
            "host": args.host,
            "port": args.port,
            "policy": args.policy,
            "access_log": not args.no_access_log,
            "seed": args.seed,
            "processes": args.gateways,
        },
        at="gateway",
    )
    if args.tokenizer is not None and not Path(args.tokenizer, "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer {args.tokenizer}: no tokenizer.json there; give the model's folder")
    kind = GatewayServer if config.processes == 1 else GatewayGroup
    settings = GatewaySettings(
        0, config, tokenizers={} if args.tokenizer is None else {"*": (args.tokenizer, {})}
    )
    server = kind(settings, source)
    host, port = server.bind()
    uvloop.run(_serve(server, source, host, port, args.drain_timeout))
    return 0


async def _serve(
    server: GatewayServer | GatewayGroup, source: StaticFleet, host: str, port: int, drain_s: float
) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopping.set)
    starting = asyncio.ensure_future(server.start())
    waiting = asyncio.ensure_future(stopping.wait())
    await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        starting.result()
        for problem in source.problems:
            print(f"warning: {problem}", file=sys.stderr)
        print(f"ready: http://{host}:{port}", flush=True)
        await waiting
    else:
        starting.cancel()
    # A second signal cuts the drain short.
    stopping.clear()
    draining = asyncio.ensure_future(server.stop(drain_s))
    again = asyncio.ensure_future(stopping.wait())
    await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await server.stop(0.0)
    again.cancel()
