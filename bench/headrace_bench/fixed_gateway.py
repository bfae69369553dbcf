"""Our gateway in a process of its own, before replicas whose endpoints are in a file.

    python -m headrace_bench.fixed_gateway --replicas replicas.json --policy delay

`headrace route` knows URLs only; here the replicas' load reports and KV events are followed as in a fleet. Prints
`ready: URL`; ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from headrace.config import Gateway, node
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_router.disaggregation import DISAGGREGATIONS
from headrace_router.policies import POLICIES
from headrace_router.types import Membership, Replica


class FixedMembership:
    """A MembershipSource that never changes."""

    def __init__(self, replicas: Sequence[Replica], models: tuple[str, ...] = ()) -> None:
        self._membership = Membership(1, tuple(replicas), models=models)

    async def watch(self, known: Membership | None) -> Membership:
        """At once; then never again."""
        if known is not None:
            await asyncio.Event().wait()
        return self._membership


def write_replicas(replicas: Sequence[Replica], path: Path) -> None:
    """For `--replicas`."""
    path.write_bytes(msgspec.json.encode(list(replicas)))


def read_replicas(path: Path) -> list[Replica]:
    """Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode(path.read_bytes(), type=list[Replica])


async def _serve(args: argparse.Namespace) -> None:
    fields = {"host": "127.0.0.1", "port": 0, "policy": args.policy, "access_log": False}
    replicas = read_replicas(args.replicas)
    if args.disaggregation is not None:
        fields["disaggregation"] = args.disaggregation
    server = GatewayServer(
        GatewaySettings(
            0,
            node(Gateway, fields, at="gateway"),
            tokenizers={replica.model: ("embedded", {}) for replica in replicas},
        ),
        FixedMembership(replicas),
    )
    host, port = server.bind()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await server.start()
    print(f"ready: http://{host}:{port}", flush=True)
    await stopping.wait()
    await server.stop(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="headrace_bench.fixed_gateway")
    parser.add_argument("--replicas", type=Path, required=True, metavar="FILE")
    parser.add_argument("--policy", choices=sorted(POLICIES), required=True)
    parser.add_argument("--disaggregation", choices=DISAGGREGATIONS)
    uvloop.run(_serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
