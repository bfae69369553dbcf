"""What a gateway goes by, and may be told anew while it serves: then all of it but its address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.config import Gateway

SETTINGS_FAILED = "settings could not be read, serving on by the last ones"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """At one version."""

    version: int  # grows with each change
    gateway: Gateway
    dead_after_s: float = 0.8  # silence that ends a replica's place in the view
    tokenizers: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By served name ("*": any other), a model's source and engine arguments."""
    weights: Mapping[str, float] = field(default_factory=dict)  # of the configured tenants


class SettingsSource(Protocol):
    """Who tells a gateway that its settings have changed: the controller."""

    async def settings(self, known: GatewaySettings | None) -> GatewaySettings:
        """Return the settings as soon as their version is not the known one (at once when that is None).

        May return `known` unchanged after a while; raises when the source cannot be reached.
        """
        ...
