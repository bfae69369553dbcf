"""`headrace serve`: bring up the fleet of a configuration and serve it."""

from __future__ import annotations

import argparse

import uvloop

from headrace import config as configuration
from headrace.config import Config, Gateway
from headrace.fleet.launch import Launch
from headrace.fleet.screen import Screen


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("serve", help="bring up the fleet of a configuration and serve it")
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headrace serve`."""
    parser.add_argument("config", metavar="CONFIG", help="the configuration, a YAML file")
    parser.add_argument("--host", help="address to listen on, instead of gateway.host")
    parser.add_argument("--port", type=int, help="instead of gateway.port; 0 takes a free one")
    parser.add_argument(
        "--address", help="a running Ray cluster to use, HOST:PORT or auto; default: start one here"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises HeadraceError when it cannot start; nothing is left then."""
    config = with_overrides(configuration.load(args.config), args.host, args.port)
    screen = Screen()
    uvloop.run(_serve(config, screen, args.address))
    return 0


async def _serve(config: Config, screen: Screen, address: str | None) -> None:
    await Launch(config, screen, address).run()


def with_overrides(config: Config, host: str | None, port: int | None) -> Config:
    """The configuration with the command line's address. Raises ConfigError for a port that cannot be."""
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    gateway = configuration.node(Gateway, {**config.gateway.model_dump(), **given}, at="gateway")
    return config.model_copy(update={"gateway": gateway})
