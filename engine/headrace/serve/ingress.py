"""The ingress deployment: one gateway in a Serve replica, before the fleet that all of them share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, MutableMapping
from typing import Any

from ray import serve

from headrace.config import Config
from headrace.errors import ReplicaUnhealthy
from headrace.fleet.front import settings_of
from headrace.fleet.membership import ControllerMembership
from headrace.gateway.app import build_app
from headrace.gateway.asgi import App, Message, Receive, RelayApp, Send
from headrace.gateway.core import GatewayCore
from headrace.serve import calls
from headrace.serve.fleet_keeper import is_fleet_of, join
from headrace.serve.fleet_owner import FleetOwner

INGRESS = "HeadraceIngress"

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class HeadraceIngress:
    """One ingress replica. Serve scales these; the engines behind them are scaled by the fleet's controller."""

    async def __init__(self, config: Config, built_ns: int) -> None:  # type: ignore[misc]  # Serve awaits it
        """Join the fleet, which the first of them starts and the first of a newer application changes. `built_ns` tells
        which is newer. Raises StartError when it does not become ready."""
        here = serve.get_replica_context()
        controller, token = await join(config, FleetOwner(here.app_name, here.deployment), built_ns)
        self._fleet, self._controller = config.fleet.name, controller
        membership = ControllerMembership(controller)
        self._core = GatewayCore(settings_of(config), membership, changes=membership, demand=membership)
        context = await self._core.prepare(token)
        await self._core.start()
        self._app: App = RelayApp(build_app(context), context)

    async def __serve_build_asgi_app__(self) -> App:
        """Serve asks for this once the constructor has returned."""
        return _nameless(self._app)

    async def check_health(self) -> None:
        """Raises ReplicaUnhealthy, upon which Serve replaces this replica.

        A controller that restarts is no reason: the gateway serves on from its last view.
        """
        if not self._core.is_ticking:
            raise ReplicaUnhealthy("the gateway's clockwork has stopped")
        if not await asyncio.to_thread(is_fleet_of, self._controller, self._fleet):
            raise ReplicaUnhealthy(f"fleet {self._fleet!r} has ended or was replaced")

    async def __del__(self) -> None:
        """Serve calls this when it has drained this replica, or when its time is up: what still runs is cut."""
        core = getattr(self, "_core", None)  # unset where the constructor failed
        if core is not None:
            await core.stop()

    # --- by handle, from another deployment

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a chat completion request, both as OpenAI's API has them. Raises HeadraceError."""
        return await calls.call(self._app, CHAT, body)

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a chat completion; call it with `handle.options(stream=True)`. Raises HeadraceError."""
        async for chunk in calls.call_stream(self._app, CHAT, body):
            yield chunk

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a completion request. Raises HeadraceError."""
        return await calls.call(self._app, COMPLETIONS, body)

    async def complete_stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a completion; call it with `handle.options(stream=True)`. Raises HeadraceError."""
        async for chunk in calls.call_stream(self._app, COMPLETIONS, body):
            yield chunk

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of any other path of the API, `/v1/embeddings` say. Raises HeadraceError."""
        return await calls.call(self._app, path, body)


def _nameless(app: App) -> App:
    """The app without its `x-request-id` on answers: Serve, which gave the request its name, adds the same again."""

    async def nameless(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def send_nameless(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await app(scope, receive, send_nameless)

    return nameless
