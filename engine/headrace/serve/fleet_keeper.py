"""The keeper: one fleet for all ingress replicas of one Serve application, from its first ingress to its end.

    ingress ── join ──> keeper ── the first time: creates the controller, waits until the fleet is ready
                          │       an application that was built later: the controller applies its configuration
                          │
                          └── asks Serve every second whether the application still stands; when it does not: ends the
                              fleet, then itself

A detached, named actor, so that it outlives any ingress replica and there is one for each fleet, whoever was first.
Serve's own deployment-scoped actors were rejected: they are killed without a word, and the engines would stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import ray

from headrace.config import Config
from headrace.errors import FatalStartError, HeadraceError, StartError
from headrace.fleet import bring_up, controller
from headrace.fleet.replica_host import NAMESPACE, controller_name
from headrace.fleet.rollout import Pace
from headrace.serve.fleet_owner import FleetOwner

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_MAX_ABSENT_LOOKS = 2
"""Looks in a row that find no application. One may fall between the two halves of a redeployment."""

_END_TIMEOUT_S = 10.0
_FAREWELL_S = 1.0
"""How long an ended keeper still answers, so that whoever waits hears why."""

_JOIN_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an ingress may not join. A value, since an exception would cross Ray wrapped in its traceback."""

    reason: str
    is_fatal: bool = False
    is_passing: bool = False  # this keeper ends; its successor may say otherwise


class FleetKeeper:
    """Async: every method runs on the actor's loop."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: Config, owner: FleetOwner, built_ns: int, internal_token: str
    ) -> None:
        """`internal_token` is an argument so that Ray's restart of this actor keeps it."""
        self._config = config
        self._built_ns = built_ns
        self._changing = asyncio.Lock()
        self._owner = owner
        self._token = internal_token
        self._controller: Any = None
        self._starting: asyncio.Task[Refusal | None] | None = None
        self._ending: asyncio.Task[None] | None = None
        if ray.get_runtime_context().was_current_actor_reconstructed:
            with contextlib.suppress(ValueError):  # it had not come so far
                self._controller = ray.get_actor(controller_name(config.fleet.name), namespace=NAMESPACE)
        self._watching = asyncio.ensure_future(self._watch())

    async def join(self, config: Config, owner: FleetOwner, built_ns: int) -> str | Refusal:
        """The fleet's internal token, once the fleet is ready. Of an application that was built later than what the
        keeper knows, the fleet goes over to its configuration."""
        if self._ending is not None:
            return Refusal("the fleet is ending", is_passing=True)
        if owner != self._owner:
            return Refusal(
                f"fleet {config.fleet.name!r} belongs to {self._owner}; set another fleet.name, or delete that "
                "application",
                is_fatal=True,
            )
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        try:
            refusal = await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            return Refusal("the fleet is ending", is_passing=True)
        if refusal is None:
            refusal = await self._go_over(config, built_ns)
        return self._token if refusal is None else refusal

    async def _go_over(self, config: Config, built_ns: int) -> Refusal | None:
        """The application was deployed anew: do the least that the difference needs."""
        async with self._changing:
            if built_ns <= self._built_ns:  # an ingress of the application before, or another of this one
                return None
            # Serve decides where its ingress listens.
            kept = {name: getattr(self._config.gateway, name) for name in ("host", "port", "processes")}
            config = config.model_copy(update={"gateway": config.gateway.model_copy(update=kept)})
            try:
                await asyncio.to_thread(bring_up.check_machine, config, is_local=False)
                await self._controller.apply.remote(config, f"serve-{built_ns}", Pace())
            except (ray.exceptions.RayTaskError, HeadraceError) as error:
                reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                message = reason.message if isinstance(reason, HeadraceError) else str(reason)
                return Refusal(message, is_fatal=True)
            self._config, self._built_ns = config, built_ns
        return None

    async def _start(self) -> Refusal | None:
        fleet = self._config.fleet
        try:
            if self._controller is None:
                nodes = await asyncio.to_thread(ray.nodes)
                is_local = sum(node["Alive"] for node in nodes) == 1
                await asyncio.to_thread(bring_up.check_machine, self._config, is_local=is_local)
                await bring_up.check_cluster(self._config)
                self._controller = controller.create(self._config, self._token, None)
                await self._controller.begin.remote()
            await bring_up.wait_until_ready(self._controller, fleet.start_timeout_s)
        except StartError as error:
            self._end(error.message)
            return Refusal(error.message, is_fatal=isinstance(error, FatalStartError))
        except Exception as error:  # supervision boundary: whatever it is, the ingress is told
            log.exception("fleet %s did not start", fleet.name)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self._end(reason)
            return Refusal(reason)
        return None

    async def _watch(self) -> None:
        absent = 0
        while absent < _MAX_ABSENT_LOOKS:
            await asyncio.sleep(_LOOK_S)
            try:
                is_deployed = await asyncio.to_thread(self._owner.is_deployed)
            except Exception as error:  # supervision boundary: Serve's controller restarts, perhaps
                log.warning("cannot ask Serve about %s: %s", self._owner, error)
                continue
            absent = 0 if is_deployed else absent + 1
        self._end(f"{self._owner} is gone")

    def _end(self, reason: str) -> None:
        if self._ending is None:
            log.warning("ending fleet %s: %s", self._config.fleet.name, reason)
            self._ending = asyncio.ensure_future(self._end_fleet())

    async def _end_fleet(self) -> None:
        starting = self._starting
        if starting is not None and not starting.done():  # else it might still make what is ended here
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        if self._controller is not None:
            await bring_up.end(self._controller, _END_TIMEOUT_S)
        await asyncio.sleep(_FAREWELL_S)
        # Not `exit_actor`: Ray lets it be called within a task of the actor only.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def is_fleet_of(controller: Any, fleet: str) -> bool:
    """Whether this is still the fleet's controller: not where the fleet has ended or was replaced. Blocks."""
    try:
        present = ray.get_actor(controller_name(fleet), namespace=NAMESPACE)
    except ValueError:
        return False
    return bool(present._actor_id == controller._actor_id)


def keeper_name(fleet: str) -> str:
    return f"{fleet}/keeper"


async def join(config: Config, owner: FleetOwner, built_ns: int) -> tuple[Any, str]:
    """Join the fleet of `config`, starting or changing it if need be. Returns its controller and internal token.

    Raises StartError, FatalStartError where another try would end the same way.
    """
    options: dict[str, Any] = {
        "name": keeper_name(config.fleet.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": 1000,
        "num_cpus": 0,
    }
    while True:
        try:
            keeper = (
                ray.remote(FleetKeeper)
                .options(**options)
                .remote(config, owner, built_ns, secrets.token_urlsafe(32))
            )
            answer: str | Refusal = await keeper.join.remote(config, owner, built_ns)
        except ray.exceptions.RayActorError:  # it ended between being found and being asked
            await asyncio.sleep(_JOIN_PAUSE_S)
            continue
        if isinstance(answer, str):
            return ray.get_actor(controller_name(config.fleet.name), namespace=NAMESPACE), answer
        if not answer.is_passing:
            raise (FatalStartError if answer.is_fatal else StartError)(answer.reason)
        await asyncio.sleep(_JOIN_PAUSE_S)
