"""The gateway before a fleet that is brought up here."""

from __future__ import annotations

from headrace.config import Gateway
from headrace.fleet import bring_up
from headrace.fleet.fleet_run import FleetRun
from headrace.gateway.group import GatewayGroup
from headrace.gateway.server import GatewayServer


def make_gateway(fleet: FleetRun, address: Gateway | None = None) -> GatewayServer | GatewayGroup:
    """Not bound yet. It follows the fleet's controller once that has started.

    `address`: with what the configuration does not say of where and how to listen.
    """
    config = fleet.config
    gateway = address or config.gateway
    kind = GatewayServer if gateway.processes == 1 else GatewayGroup
    return kind(
        gateway,
        fleet.membership,
        dead_after_s=config.fleet.dead_after_s,
        tokenizers=bring_up.tokenizers(config),
        settings=fleet.membership,
        collectors=(fleet.metrics,),
        tenants=config.tenants,
        demand=fleet.membership,
    )


def url_of(host: str, port: int) -> str:
    """`http://127.0.0.1:8000`."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
