"""Nodes that are not reached, long before Ray gives them up: it takes a minute where nothing refuses its connections.

    not reached for `fleet.node_timeout_s` ──> lost: its replicas have failed, others start elsewhere
    reached again ──> what was left running there is ended, since another one does its work

A node whose processes were killed refuses connections, and calls to its replicas break at once: no need for this.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from time import monotonic

import ray

from headrace.fleet.node_list import is_reached
from headrace.fleet.node_task import on_node

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_FENCE_TIMEOUT_S = 30.0
"""To start a process on a node that has come back, and to hear from it."""

OWN_TITLE = "ReplicaActor"
"""What Ray calls the processes of replicas, by which one is told from a process that got its number."""


class Silences:
    """For how long each node has not been reached. Pure but for the clock that is given."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._since_s: dict[str, float] = {}

    def take(self, reached: Mapping[str, bool], now_s: float) -> tuple[set[str], set[str]]:
        """What a look has found, by node. Returns the nodes that are lost now, and those of them that are back."""
        back = {
            node
            for node, since_s in self._since_s.items()
            if reached.get(node) and self._is_lost(since_s, now_s)
        }
        self._since_s = {
            node: self._since_s.get(node, now_s) for node, is_there in reached.items() if not is_there
        }
        return {node for node, since_s in self._since_s.items() if self._is_lost(since_s, now_s)}, back

    def _is_lost(self, since_s: float, now_s: float) -> bool:
        return now_s - since_s >= self.patience_s


class LostNodes:
    """Belongs to the controller's loop."""

    def __init__(
        self,
        patience_s: Callable[[], float],
        running: Callable[[], Iterable[tuple[str, int | None]]],
        lost: Callable[[str], None],
    ) -> None:
        """`running` tells node and process of each replica that there is; `lost` hears of a node, at each look while it
        is not reached."""
        self._patience_s = patience_s
        self._running = running
        self._lost = lost
        self._silences = Silences(patience_s())
        self._left: dict[str, set[int]] = {}  # processes on lost nodes
        self._fencing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
            except Exception:  # supervision boundary: one failed look must not end all
                log.exception("looking at the nodes failed")

    async def _look(self) -> None:
        by_node: dict[str, set[int]] = {}
        for node, pid in self._running():
            by_node.setdefault(node, set()).update(() if pid is None else {pid})
        watched = (by_node.keys() | self._left.keys()) - {ray.get_runtime_context().get_node_id()}
        if not watched:  # everything is on the node that this runs on: nothing to ask Ray for
            return
        listed = [
            node for node in await asyncio.to_thread(ray.nodes) if node["NodeID"] in watched and node["Alive"]
        ]
        reached = dict(
            zip(
                (node["NodeID"] for node in listed),
                await asyncio.gather(*map(is_reached, listed)),
                strict=True,
            )
        )
        self._silences.patience_s = self._patience_s()
        lost, back = self._silences.take(reached, monotonic())
        for node in lost & by_node.keys():
            log.warning("node %s is not reached for %g s", node, self._silences.patience_s)
            self._left.setdefault(node, set()).update(by_node[node])
            self._lost(node)
        self._left = {
            node: pids for node, pids in self._left.items() if node in reached
        }  # else Ray has ended them
        for node in back & self._left.keys():
            fencing = asyncio.ensure_future(_fence(node, self._left.pop(node)))
            self._fencing.add(fencing)
            fencing.add_done_callback(self._fencing.discard)


async def _fence(node_id: str, pids: Collection[int]) -> None:
    """End these processes of a node."""
    try:
        ended = await on_node(node_id, end_replicas, sorted(pids), timeout_s=_FENCE_TIMEOUT_S)
        log.warning("node %s is back; ended what was left there: %s", node_id, ended)
    except (
        TimeoutError,
        ray.exceptions.RayError,
    ) as error:  # then Ray gives the node up, and it ends by itself
        log.warning("node %s is back and does not answer: %s", node_id, type(error).__name__)


def end_replicas(pids: Iterable[int]) -> list[int]:
    """Kill those of these processes that are replicas still; their wardens end the engines. Returns which were."""
    ended = []
    for pid in pids:
        try:
            if OWN_TITLE in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
                ended.append(pid)
        except (OSError, ValueError):  # gone, or another's
            continue
    return ended
