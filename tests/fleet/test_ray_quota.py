"""Two tenants share eight GPUs, on a real Ray with simulated replicas, while clients stream through the gateway."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from ray_fleet import PATIENCE_S, Fleet, ray_fleet

from headrace.config import parse
from headrace.fleet.quota_status import QuotaStatus
from headrace_router.types import Membership, ReplicaState

pytestmark = [pytest.mark.ray, pytest.mark.long]

NUM_CLIENTS = 12  # of each model
NUM_TOKENS = 60


def model(name: str, replicas: int) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "simulated",
        "pools": [{"replicas": replicas, "tenant": name}],
        "simulated": {"step_s": 0.01},
    }


CONFIG = parse(
    {
        "fleet": {
            "name": "quota-test",
            "simulated_nodes": [{"accelerator": "H100", "gpus": 4}] * 2,
            "quota": {"min_run_s": 0},
        },
        "models": [model("search", 4), model("chat", 6)],
        "tenants": [
            {"name": "search", "gpus": {"H100": {"nominal": 6}}},
            {"name": "chat", "gpus": {"H100": {"nominal": 2}}},
        ],
    }
)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ray_fleet(CONFIG) as running:
        yield running


def ready(membership: Membership) -> dict[str, int]:
    return Counter(one.model for one in membership.replicas if one.state is ReplicaState.READY)


async def until_ready(fleet: Fleet, **counts: int) -> Membership:
    return await fleet.until(lambda now: ready(now) == counts and len(now.replicas) == sum(counts.values()))


async def quota(fleet: Fleet, holds: Callable[[QuotaStatus], bool] = lambda _: True) -> QuotaStatus:
    """The first status of which `holds` is true. Asked again and again: no news comes of a round."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds(status := await fleet.controller.quota.remote()):
            pass
    found: QuotaStatus = status
    return found


class Clients:
    """Stream from both models without a pause, and remember what went wrong."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client
        self._ends = False
        self.errors: list[str] = []
        self.answers: Counter[str] = Counter()

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[Clients]:
        tasks = [
            asyncio.create_task(self._stream(name)) for name in ("search", "chat") for _ in range(NUM_CLIENTS)
        ]
        try:
            yield self
        finally:
            self._ends = True
            await asyncio.gather(*tasks)

    async def _stream(self, name: str) -> None:
        while not self._ends:
            try:
                stream = await self._client.completions.create(
                    model=name,
                    prompt="Tell me of rivers.",
                    max_tokens=NUM_TOKENS,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                chunks = [chunk async for chunk in stream]
            except openai.APIError as error:
                self.errors.append(f"{name}: {error}")
                continue
            finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1:]
            usage = chunks[-1].usage if chunks else None
            if finish != ["length"] or usage is None or usage.completion_tokens != NUM_TOKENS:
                self.errors.append(f"{name}: ended by {finish} after {usage}")
            self.answers[name] += 1


async def test_gpus_are_borrowed_reclaimed_by_draining_and_given_back_without_an_error_to_any_client(
    fleet: Fleet,
) -> None:
    await until_ready(fleet, search=4, chat=4)
    async with fleet.gateway() as client, Clients(client).streaming() as clients:
        borrowed = await quota(fleet)
        assert {row.tenant: (row.held, row.borrowed, row.lent) for row in borrowed.tenants} == {
            "search": (4, 0, 2), "chat": (4, 2, 0),
        }  # fmt: skip
        assert [row.tenant for row in borrowed.waiting] == ["chat", "chat"]
        assert all("it would borrow" in row.reason for row in borrowed.waiting)

        await fleet.scale(6, "search")
        reclaiming = await quota(fleet, lambda status: any(row.drains_for for row in status.replicas))
        assert {row.tenant for row in reclaiming.replicas if row.is_draining} == {"chat"}
        assert {row.replica for row in reclaiming.waiting if row.is_promised} == {
            row.drains_for for row in reclaiming.replicas if row.is_draining
        }
        await until_ready(fleet, search=6, chat=2)

        await fleet.scale(2, "search")
        await until_ready(fleet, search=2, chat=6)
        given_back = await quota(fleet)
        assert {row.tenant: row.lent for row in given_back.tenants} == {"search": 4, "chat": 0}
        assert given_back.waiting == ()
    assert clients.errors == []
    assert min(clients.answers.values()) >= NUM_CLIENTS
    await fleet.scale(None, "search")


async def test_a_replica_that_waits_is_told_with_its_reason(fleet: Fleet) -> None:
    await until_ready(fleet, search=4, chat=4)
    waiting = [row for row in (await fleet.status()).replicas if row.waits_for_gpus]
    assert [row.model for row in waiting] == ["chat", "chat"]
    assert all(row.reason.startswith("waits for GPUs: it would borrow") for row in waiting)
    assert all(row.state is ReplicaState.PENDING and not row.failures for row in waiting)


async def test_who_was_drained_is_not_started_again_where_its_owner_needs_the_place(fleet: Fleet) -> None:
    await fleet.scale(6, "search")
    await until_ready(fleet, search=6, chat=2)
    at_rest = await quota(fleet)
    asked_for_s = at_rest.waiting[0].waited_s + 3  # a dozen rounds
    later = await quota(fleet, lambda status: status.waiting[0].waited_s > asked_for_s)
    assert [(row.replica, row.spots) for row in later.replicas] == [
        (row.replica, row.spots) for row in at_rest.replicas
    ]
    await fleet.scale(None, "search")
    await until_ready(fleet, search=4, chat=4)


async def test_a_model_whose_replicas_wait_without_hope_is_not_said_to_come(fleet: Fleet) -> None:
    await fleet.scale(8, "search")
    await until_ready(fleet, search=6, chat=2)
    await fleet.scale(0, "chat")
    await until_ready(fleet, search=8)
    now = await fleet.until(lambda now: "chat" not in now.coming)
    assert now.models == ("search", "chat")
    await fleet.scale(1, "chat")
    await fleet.until(lambda now: "chat" in now.coming)  # others drain for it
    await until_ready(fleet, search=7, chat=1)
    await fleet.scale(None, "chat")
    await fleet.scale(None, "search")
    await until_ready(fleet, search=4, chat=4)


async def test_a_restarted_controller_knows_who_has_which_gpus(fleet: Fleet) -> None:
    members = await until_ready(fleet, search=4, chat=4)
    before = await quota(fleet)
    os.kill(await fleet.controller.process_id.remote(), signal.SIGKILL)
    after_members = await fleet.until(lambda now: now.epoch != members.epoch)
    after = await quota(fleet)
    assert {one.boot_id for one in after_members.replicas} == {one.boot_id for one in members.replicas}
    assert [(row.replica, row.spots) for row in after.replicas] == [
        (row.replica, row.spots) for row in before.replicas
    ]
    assert [row.replica for row in after.waiting] == [row.replica for row in before.waiting]


async def test_a_replica_that_dies_comes_back_to_its_gpus(fleet: Fleet) -> None:
    await until_ready(fleet, search=4, chat=4)
    before = await quota(fleet)
    row = next(one for one in (await fleet.status()).replicas if one.model == "chat" and one.is_ready)
    assert row.pid is not None
    os.kill(row.pid, signal.SIGKILL)
    await fleet.until(lambda now: row.boot_id not in [one.boot_id for one in now.replicas])
    await until_ready(fleet, search=4, chat=4)
    after = await quota(fleet)
    assert [(one.replica, one.spots) for one in after.replicas] == [
        (one.replica, one.spots) for one in before.replicas
    ]
