"""The gateway before a fleet that is brought up here."""

from __future__ import annotations

from headrace.config import Config, Gateway
from headrace.fleet import bring_up
from headrace.fleet.fleet_run import FleetRun
from headrace.gateway.group import GatewayGroup
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings


def settings_of(config: Config, address: Gateway | None = None) -> GatewaySettings:
    """What a gateway before this fleet begins with. `address`: see `make_gateway`."""
    return GatewaySettings(
        0,
        address or config.gateway,
        config.fleet.dead_after_s,
        bring_up.tokenizers(config),
        {tenant.name: tenant.weight for tenant in config.tenants},
    )


def make_gateway(fleet: FleetRun, address: Gateway | None = None) -> GatewayServer | GatewayGroup:
    """Not bound yet. It follows the fleet's controller once that has started.

    `address`: with what the configuration does not say of where and how to listen.
    """
    settings, line = settings_of(fleet.config, address), fleet.membership
    kind = GatewayServer if settings.gateway.processes == 1 else GatewayGroup
    return kind(settings, line, changes=line, demand=line, collectors=(fleet.metrics,))


def url_of(host: str, port: int) -> str:
    """`http://127.0.0.1:8000`."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
