"""vLLM's KV connectors: what the fleet must know of each, in one place. Pure.

NixlConnector            the prefilling engine holds the blocks, the decoding one fetches them: both halves of a
                         request carry `kv_transfer_params`
LMCache..., ...Store     a store that all replicas share: the first half fills it, the second finds it there, and
                         neither carries anything
Offloading..., others    a replica's own host memory, or a protocol that the gateway does not speak: passed to vLLM
                         as configured, and nothing is handed over
MultiConnector           what its first part that hands over does
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NIXL = "NixlConnector"
OFFLOADING = "OffloadingConnector"
MULTI = "MultiConnector"
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class HandOverForm:
    """How a prompt is handed over through one connector."""

    first: bytes | None  # what the prefilling half carries as `kv_transfer_params`, JSON; None: nothing
    holds: bool  # the prefilling engine keeps the blocks until they are fetched, released or their lease ends


_SHARED_STORE = HandOverForm(first=None, holds=False)
HAND_OVER: Mapping[str, HandOverForm] = {
    NIXL: HandOverForm(first=b'{"do_remote_decode":true,"do_remote_prefill":false}', holds=True),
    "LMCacheConnectorV1": _SHARED_STORE,
    "LMCacheMPConnector": _SHARED_STORE,
    "MooncakeStoreConnector": _SHARED_STORE,
}
"""Connectors by which one replica can compute a prompt for another."""


def handing_over(connector: str | None, options: Mapping[str, Any]) -> str | None:
    """The connector through which prompts are handed over; None where nothing is."""
    if connector != MULTI:
        return connector if connector in HAND_OVER else None
    parts = options.get("kv_connector_extra_config", {}).get("connectors", ())
    names = (part.get("kv_connector") for part in parts if isinstance(part, Mapping))
    return next((name for name in names if name in HAND_OVER), None)


def transfer_config(
    connector: str | None, options: Mapping[str, Any], host_cache_gib: float | None = None
) -> dict[str, Any] | None:
    """vLLM's `kv_transfer_config`, None where nothing asks for one; `options` win over ours.

    A host-memory tier beside a connector makes both parts of a MultiConnector: vLLM's own `kv_offloading_size` would
    replace the connector. Blocks that do not come (their engine died, their lease ended) are computed again; by vLLM's
    default the request fails.
    """
    ours: dict[str, Any] = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if connector is not None:
        ours["kv_connector"] = connector
    if host_cache_gib is None:
        return None if connector is None else {**ours, **options}
    offloading = {
        "kv_connector": OFFLOADING,
        "kv_role": "kv_both",
        # Without the second the tier's events carry no tokens, and no router can tell what lies there.
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": int(host_cache_gib * GIB),
            "self_describing_kv_events": True,
        },
    }
    if connector is None:
        return {**ours, **offloading}
    parts = [{**ours, **options}, offloading]
    return {**ours, "kv_connector": MULTI, "kv_connector_extra_config": {"connectors": parts}}
