"""The `headrace` command: finds the module of one command, imports that one, runs it.

A command is a module with `add_parser(subparsers)`, which adds a parser of the command's name, and
`run(args) -> int`, the exit code. Ours are in `COMMANDS`; others join through the entry-point group
`headrace.commands`, name to module. Only the module of the command that was asked for is imported, so
`headrace route` never pays for Ray, and `headrace --help` for nothing at all.

Exit codes: 0 done, 1 a `HeadraceError` (one line per problem on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points, version
from types import ModuleType

from headrace.errors import HeadraceError

GROUP = "headrace.commands"


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives and what `headrace --help` says of it."""

    module: str
    help: str


COMMANDS: Mapping[str, Command] = {
    "serve": Command(
        "headrace.fleet.serve_command", "serve the models of a configuration on a fleet of replicas"
    ),
    "status": Command("headrace.fleet.status_command", "print the replicas of the running fleet"),
    "apply": Command("headrace.fleet.apply_command", "bring a running fleet to another configuration"),
    "restart": Command(
        "headrace.fleet.restart_command", "replace replicas of a running fleet while the others serve"
    ),
    "quota": Command("headrace.fleet.quota_command", "show who holds, borrows and waits for shared GPUs"),
    "scale": Command("headrace.fleet.scale_command", "show or set how many replicas a pool has, and why"),
    "route": Command(
        "headrace.gateway.route_command", "run the gateway alone, before servers that already run"
    ),
    "explain": Command(
        "headrace.explain_command", "show the gateway's last routing decisions and their reasons"
    ),
    "config": Command("headrace.config_command", "check a configuration, print its JSON schema"),
}

JOINED_HELP: Mapping[str, str] = {
    "bench": "load a server and measure it",
    "simulate": "replay a trace on a simulated fleet",
    "calibrate": "fit a timing model to a real engine",
}
"""Help for commands that join from the bench. Reading theirs would mean importing them."""


class CommandMissing(HeadraceError):
    """A command is known, its module or something that it needs is not installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises SystemExit on wrong usage, as argparse does."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except HeadraceError as error:
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"headrace: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left (`headrace status | head`). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def commands() -> dict[str, Command]:
    """Ours, then those that joined, by name. One that joined cannot take the name of one of ours."""
    joined = {point.name: point.value for point in entry_points(group=GROUP)}
    return {
        name: Command(module, JOINED_HELP.get(name, "")) for name, module in sorted(joined.items())
    } | dict(COMMANDS)


def _dispatch(words: list[str]) -> int:
    known = commands()
    asked = words[0] if words else ""
    parser = argparse.ArgumentParser(
        prog="headrace", description="Serve large language models on a fleet of vLLM replicas."
    )
    parser.add_argument("--version", action="version", version=f"headrace {version('headrace')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    if asked not in known:
        for name in sorted(known, key=lambda name: (name not in COMMANDS, name)):
            subparsers.add_parser(name, help=known[name].help, add_help=False)
        parser.parse_args(words)  # --help, --version, or a usage error: each ends the process
        raise SystemExit(2)
    module = _import(asked, known[asked].module)
    module.add_parser(subparsers)
    args = parser.parse_args(words)
    code: int = module.run(args)
    return code


def _import(name: str, path: str) -> ModuleType:
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if path == missing or path.startswith(f"{missing}."):
            raise CommandMissing(
                f"the command {name!r} is not part of this installation (no {missing})"
            ) from error
        extra = {"ray": "ray", "vllm": "cpu' or 'cuda", "matplotlib": "bench"}.get(missing.partition(".")[0])
        advice = f"install headrace with the extra '{extra}'" if extra else f"install {missing}"
        raise CommandMissing(
            f"the command {name!r} needs {missing}, which is not installed: {advice}"
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
