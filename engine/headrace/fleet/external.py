"""External models: servers that somebody else runs. Members of the fleet that nobody starts, only probes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from headrace.config import Config, Model
from headrace.fleet.status import ReplicaStatus
from headrace.gateway.static_fleet import StaticFleet
from headrace_router.types import Membership, Replica, ReplicaId, ReplicaState, Role

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_SILENT = "does not answer"


class ExternalMembers:
    """Follows the servers of every external model; calls `changed` when one comes or goes."""

    def __init__(self, config: Config, changed: Callable[[], None]) -> None:
        self._models = _external(config)
        self._fleets = {name: _fleet(model) for name, model in self._models.items()}
        self._changed = changed
        self._known: dict[str, Membership] = {}
        self._since_s: dict[tuple[ReplicaId, ReplicaState], float] = {}
        self._following: dict[str, asyncio.Task[None]] = {}
        self._began_s = time.monotonic()

    def start(self) -> None:
        self._following = {name: asyncio.ensure_future(self._follow(name)) for name in self._fleets}

    def stop(self) -> None:
        for task in self._following.values():
            task.cancel()

    def go_by(self, config: Config) -> None:
        """Follow the servers of another configuration. Those that stay are members all the while."""
        models, before = _external(config), self._models
        self._models = models
        for name in before.keys() - models.keys():
            self._following.pop(name).cancel()
            del self._fleets[name]
            self._known.pop(name, None)
        for name, model in models.items():
            if before.get(name) != model:
                if name in before:
                    self._following.pop(name).cancel()
                self._fleets[name] = _fleet(model)
                self._following[name] = asyncio.ensure_future(self._follow(name, is_new=True))
        self._changed()

    def replicas(self) -> list[Replica]:
        return [replica for known in self._known.values() for replica in known.replicas]

    def rows(self) -> list[ReplicaStatus]:
        now_s = time.monotonic()
        problems = {name: _by_url(fleet.problems) for name, fleet in self._fleets.items()}
        rows = [
            ReplicaStatus(
                id=replica.id,
                model=replica.model,
                role=replica.role,
                state=replica.state,
                state_s=now_s - self._since_s.get((replica.id, replica.state), now_s),
                is_external=True,
                url=replica.endpoints.url,
                reason=""
                if replica.state is ReplicaState.READY
                else problems[name].get(replica.endpoints.url, _SILENT),
            )
            for name, known in self._known.items()
            for replica in known.replicas
        ]
        shown = {row.url for row in rows}
        return rows + [
            ReplicaStatus(
                id=ReplicaId(urlsplit(url).netloc.rpartition("@")[2]),
                model=name,
                role=Role.UNIFIED,
                state=ReplicaState.FAILED,
                state_s=now_s - self._began_s,
                is_external=True,
                url=url,
                reason=problem,
            )
            for name, told in problems.items()
            for url, problem in told.items()
            if url not in shown
        ]

    async def _follow(self, name: str, *, is_new: bool = False) -> None:
        while True:
            try:
                known = await self._fleets[name].watch(None if is_new else self._known.get(name))
                is_new = False
            except Exception:  # supervision boundary: a server's odd answer must not end the probing
                log.exception("probing the servers of %s failed", name)
                await asyncio.sleep(_RETRY_S)
                continue
            if known is not self._known.get(name):
                self._known[name] = known
                now_s = time.monotonic()
                states = [(replica.id, replica.state) for replica in self.replicas()]
                self._since_s = {state: self._since_s.get(state, now_s) for state in states}
                self._changed()


def _external(config: Config) -> dict[str, Model]:
    return {model.name: model for model in config.models if model.backend == "external"}


def _fleet(model: Model) -> StaticFleet:
    return StaticFleet(list(model.urls), api_key=model.api_key, model=model.name)


def _by_url(problems: Iterable[str]) -> dict[str, str]:
    """`http://a:1 does not answer`: by its first word."""
    return {url: problem for url, _, problem in (line.partition(" ") for line in problems)}
