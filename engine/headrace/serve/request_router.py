"""Our policy inside a Ray Serve LLM application that exists already.

    LLMConfig(..., deployment_config=dict(request_router_config=RequestRouterConfig(
        request_router_class="headrace.serve.DelayAwareRequestRouter")))

Serve makes one router in every process that holds a handle to the deployment, and asks it for each request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from headrace.serve import request_prompt
from headrace.serve.request_routing import RequestRouting


class DelayAwareRequestRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Sends each request where its first token is predicted to come soonest.

    `request_router_kwargs`: `policy`, one of Headrace's (default `delay`); `seed`, of those that draw lots.
    """

    def initialize_state(self, policy: str = "delay", seed: int = 0) -> None:
        """Serve calls this once, with `request_router_kwargs`. Raises ValueError for an unknown policy."""
        self._routing = RequestRouting(policy, seed)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Every replica that Serve allows, each a rank of its own, the best first."""
        if pending_request is None:
            return [list(candidate_replicas)]
        metadata = pending_request.metadata
        lora = metadata.multiplexed_model_id
        narrow = self.apply_multiplex_routing if lora else self.apply_locality_routing
        allowed = {replica_id.to_full_id_str(): replica_id for replica_id in narrow(pending_request)}
        lengths = {
            name: self._replica_queue_len_cache.get(replica_id) for name, replica_id in allowed.items()
        }
        arguments = [*pending_request.args, *pending_request.kwargs.values()]
        request_id = metadata.internal_request_id
        ranked = self._routing.rank(
            request_id,
            request_prompt.prompt_bytes(arguments),
            tuple(allowed),
            lengths,
            time.monotonic(),
            lora=lora,
            max_tokens=request_prompt.max_tokens(arguments),
        )
        pending_request.future.add_done_callback(lambda future: self._given_up(request_id, future))
        return [
            [replica] for name in ranked if (replica := self._replicas.get(allowed[name])) is not None
        ] or [list(candidate_replicas)]

    def _given_up(self, request_id: str, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            self._routing.ended(request_id, time.monotonic())

    # --- what Serve tells

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """However it ended; also when a replica turned it down and Serve looks for another."""
        self._routing.ended(internal_request_id, time.monotonic(), replica_id.to_full_id_str())

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The deployment's replicas are these."""
        super().update_replicas(replicas)
        self._follow()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """One is gone before Serve's controller has noticed."""
        super().on_replica_actor_died(replica_id)
        self._follow()

    def _follow(self) -> None:
        names = [replica_id.to_full_id_str() for replica_id in self._replicas]
        self._routing.follow(names, time.monotonic())

    # --- what Serve tells nobody of: where a request really went, and first tokens

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """As Serve makes it, with an ear at its answers."""
        replica = super().create_replica_wrapper(replica_info)
        send, name = replica.try_send_request, replica.replica_id.to_full_id_str()

        def try_send_request(request: PendingRequest, with_rejection: bool) -> ReplicaResult:
            self._routing.routed(request.metadata.internal_request_id, name, time.monotonic())
            result = send(request, with_rejection)
            if not request.metadata.is_streaming or not request_prompt.is_stream(request.args):
                return result
            request_id, loop = request.metadata.internal_request_id, self._event_loop

            def answered() -> None:
                """Answers are read on the handle's loop, which need not be the router's."""
                loop.call_soon_threadsafe(self._routing.answered, request_id, time.monotonic())

            return _ObservedResult(result, answered)

        replica.try_send_request = try_send_request
        return replica


class _ObservedResult(ReplicaResult):  # type: ignore[misc]
    """A result that tells when its first piece comes. All else is the result's own."""

    def __init__(self, result: ReplicaResult, answered: Callable[[], None]) -> None:
        self._result = result
        self._answered: Callable[[], None] | None = answered

    async def __anext__(self) -> Any:
        piece = await self._result.__anext__()
        self._note()
        return piece

    def __next__(self) -> Any:
        piece = self._result.__next__()
        self._note()
        return piece

    def _note(self) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered()

    async def get_rejection_response(self) -> Any:
        return await self._result.get_rejection_response()

    def get(self, timeout_s: float | None) -> Any:
        return self._result.get(timeout_s)

    async def get_async(self) -> Any:
        return await self._result.get_async()

    def add_done_callback(self, callback: Callable[..., Any]) -> None:
        self._result.add_done_callback(callback)

    def cancel(self) -> None:
        self._result.cancel()

    def to_object_ref(self) -> Any:
        return self._result.to_object_ref()

    async def to_object_ref_async(self) -> Any:
        return await self._result.to_object_ref_async()

    def to_object_ref_gen(self) -> Any:
        return self._result.to_object_ref_gen()
