"""What `headrace status` says beneath its tables: gateways on other nodes, the last start of each pool by phase, and
the last rollout."""

from __future__ import annotations

from headrace.fleet.start_phases import in_words
from headrace.fleet.status import FleetStatus, GatewayStatus, ReplicaStatus, RolloutStatus


def notes(status: FleetStatus) -> list[str]:
    """One line each, none where there is nothing to say."""
    newest: dict[tuple[str, str], ReplicaStatus] = {}
    for replica in status.replicas:
        key = (replica.model, replica.role.value)
        if replica.phases_s and (key not in newest or replica.state_s < newest[key].state_s):
            newest[key] = replica
    told = [gateway_line(gateway) for gateway in status.gateways]
    told += [_start(replica) for replica in newest.values()]
    if status.rollout is not None:
        told.append(_rollout(status.rollout))
    return told


def gateway_line(gateway: GatewayStatus) -> str:
    """`gateway on 10.0.0.2: serving at http://10.0.0.2:8000`."""
    if gateway.is_serving:
        return f"gateway on {gateway.address}: serving at {gateway.url}"
    return f"gateway on {gateway.address}: {gateway.state}" + (
        f", {gateway.reason}" if gateway.reason else ""
    )


def _start(replica: ReplicaStatus) -> str:
    total_s = sum(seconds for _, seconds in replica.phases_s)
    return f"last start: {replica.id} in {total_s:.1f} s: {in_words(replica.phases_s)}"


def _rollout(rollout: RolloutStatus) -> str:
    count = f", {rollout.replaced} of {rollout.total} replaced" if rollout.total else ""
    reason = f": {rollout.reason}" if rollout.reason else ""
    return f"last change: {rollout.what}, {rollout.state}{count}{reason}"
