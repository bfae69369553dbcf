"""Requests that wait in the gateway: who is let in, when, to whom, and every way in which the wait may end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from headrace.config import Queue, Tenant
from headrace.gateway.admission import _refusal
from headrace.gateway.waiting_line import MOST_UNKNOWN, OTHERS, Held, WaitingLine
from headrace_router.queue_ticket import Offer, QueueLimits
from headrace_router.types import BootId, Request

Open = Callable[..., Any]
BODY = {"model": "m", "prompt": "x"}
ONE_AT_A_TIME = Queue(saturated_wait_s=0.0)


def asked(tenant: str = "", timeout_s: float | None = None, *, explain: bool = False) -> str:
    """Headers."""
    headers = "connection: close\r\n"
    headers += f"x-tenant-id: {tenant}\r\n" if tenant else ""
    headers += f"x-request-timeout: {timeout_s}\r\n" if timeout_s is not None else ""
    return headers + ("x-headrace-explain: 1\r\n" if explain else "")


def outcomes(gateway: Any) -> dict[str, int]:
    counts: dict[str, int] = gateway.context.admission.measures.counts("m")
    return counts


async def holding(gateway: Any, number: int, tenant: str = "", **body: Any) -> list[asyncio.Task[Any]]:
    """Send so many requests, one after the other, that all must wait."""
    tasks = []
    for _ in range(number):
        before = gateway.context.admission.num_waiting
        tasks.append(asyncio.ensure_future(gateway.post({**BODY, **body}, headers=asked(tenant))))
        await gateway.until_held(before + 1)
    return tasks


# --- let in


async def test_light_load_touches_no_queue(front: Open, face: str) -> None:
    async with front(face, reports=True) as gateway:
        answers = [(await gateway.post(BODY)).status for _ in range(5)]
        assert answers == [200] * 5
        assert (gateway.context.admission.lines, outcomes(gateway)) == ({}, {})
        await gateway.settled()


async def test_a_request_that_finds_all_saturated_goes_to_whoever_comes_free_first(
    front: Open, face: str
) -> None:
    async with front(face, reports=True) as gateway:
        gateway.saturate("a", "b")
        waiting = asyncio.ensure_future(gateway.post(BODY, headers=asked("t", explain=True)))
        await gateway.until_held(1)
        gateway.context.check_integrity()
        assert gateway.context.metrics.in_flight == 1
        gateway.tell("b")
        answer = await waiting
        assert (answer.status, answer.json()["by"]) == (200, "b")
        assert answer.headers["x-headrace-queue"].startswith("waited_s=0.")
        assert 'tenant="t"' in answer.headers["x-headrace-queue"]
        latest = gateway.context.decisions.latest(1)[0]
        assert latest["waited_s"] > 0
        await gateway.settled()
        assert outcomes(gateway) == {"dispatched": 1}
        assert gateway.context.admission.measures.waits["m"].count == 1
        assert gateway.context.metrics.of("m").ended == {(200, ""): 1}


async def test_one_free_replica_is_enough(front: Open) -> None:
    async with front(reports=True) as gateway:
        gateway.saturate("a")
        assert (await gateway.post(BODY)).status == 200
        assert outcomes(gateway) == {}


async def test_tenants_take_turns(front: Open, face: str) -> None:
    async with front(face, num_replicas=1, reports=True, queue=ONE_AT_A_TIME) as gateway:
        gateway.saturate("a")
        waiting = [
            *await holding(gateway, 4, "big", user="big"),
            *await holding(gateway, 2, "small", user="small"),
        ]
        gateway.tell("a")
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
        served = [request["user"] for request in gateway.replicas[0].requests]
        assert served == ["big", "small", "big", "small", "big", "big"]
        await gateway.settled()


async def test_tenants_take_turns_where_long_answers_hold_every_place(front: Open, face: str) -> None:
    async with front(face, num_replicas=1, reports=True, max_running=2) as gateway:
        gateway.tell("a", running=3)  # one waits in the engine
        waiting = [
            *await holding(gateway, 4, "big", user="big"),
            *await holding(gateway, 2, "small", user="small"),
        ]
        gateway.tell("a", running=2)
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
        served = [request["user"] for request in gateway.replicas[0].requests]
        assert served == ["big", "small", "big", "small", "big", "big"]
        await gateway.settled()


async def test_each_place_that_comes_free_lets_one_in(front: Open) -> None:
    async with front(num_replicas=1, reports=True, max_running=2) as gateway:
        gateway.tell("a", running=3)
        stalling = {"script": {"all": "stream_then_hang"}, "stream": True}
        waiting = await holding(gateway, 3, **stalling)
        for held in (2, 1):
            gateway.tell("a", running=2)
            await gateway.until_held(held)
            gateway.tell("a", running=3)
            assert gateway.context.admission.num_waiting == held
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await gateway.settled()


async def test_weights_are_those_of_the_configuration(front: Open) -> None:
    settings = {"queue": ONE_AT_A_TIME, "tenants": (Tenant(name="heavy", weight=3.0),)}
    async with front(num_replicas=1, reports=True, **settings) as gateway:
        gateway.saturate("a")
        waiting = [
            *await holding(gateway, 6, "heavy", user="heavy"),
            *await holding(gateway, 6, "light", user="light"),
        ]
        gateway.tell("a")
        await asyncio.gather(*waiting)
        served = [request["user"] for request in gateway.replicas[0].requests]
        assert served[:8].count("heavy") == 6


async def test_a_lower_priority_number_goes_first(front: Open) -> None:
    async with front(num_replicas=1, reports=True, queue=ONE_AT_A_TIME) as gateway:
        gateway.saturate("a")
        waiting = [
            *await holding(gateway, 1, priority=7),
            *await holding(gateway, 1, priority="not a number"),
            *await holding(gateway, 1, priority=-1),
        ]
        gateway.tell("a")
        await asyncio.gather(*waiting)
        assert [request["priority"] for request in gateway.replicas[0].requests] == [-1, "not a number", 7]


async def test_newcomers_do_not_pass_those_that_wait(front: Open) -> None:
    async with front(num_replicas=1, reports=True, queue=ONE_AT_A_TIME) as gateway:
        gateway.saturate("a")
        (first,) = await holding(gateway, 1, user="first")
        gateway.tell("a")  # pumped in the next turn of the loop; a request that comes before is behind
        second = asyncio.ensure_future(gateway.post({**BODY, "user": "second"}))
        await asyncio.gather(first, second)
        assert [request["user"] for request in gateway.replicas[0].requests] == ["first", "second"]


async def test_a_blind_policy_is_offered_only_the_free_ones(front: Open) -> None:
    """Round robin would send every second one to the saturated replica, and never fill the free one."""
    async with front(reports=True, policy="round_robin", queue=ONE_AT_A_TIME) as gateway:
        gateway.saturate("a", "b")
        waiting = await holding(gateway, 6)
        gateway.tell("b")
        answers = await asyncio.gather(*waiting)
        assert {answer.json()["by"] for answer in answers} == {"b"}
        await gateway.settled()


async def test_servers_that_report_nothing_are_never_taken_for_saturated(front: Open) -> None:
    async with front(num_replicas=1, queue=ONE_AT_A_TIME) as gateway:
        slow = asyncio.ensure_future(gateway.post({**BODY, "script": {"all": "hang"}, "pad": "x" * 500_000}))
        await gateway.replicas[0].started.wait()
        assert (await gateway.post(BODY)).status == 200
        assert outcomes(gateway) == {}
        slow.cancel()


# --- a replica that is not there yet


class Told:
    """A demand sink that waits for a report of requests that wait."""

    def __init__(self) -> None:
        self.held: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def tell(self, demand: Any) -> None:
        if demand.pools[0].held and not self.held.done():
            self.held.set_result(demand.pools[0])


async def test_the_first_request_of_a_model_at_zero_is_answered_when_its_replica_is_there(
    front: Open, face: str
) -> None:
    told = Told()
    async with front(face, reports=True, demand=told) as gateway:
        gateway.source.change([], models=("m",), coming=("m",))
        while not gateway.context.admission.is_coming("m"):
            await asyncio.sleep(0)
        first = asyncio.ensure_future(gateway.post(BODY))
        await gateway.until_held(1)
        pool = await asyncio.wait_for(told.held, 0.9)  # at once, not with the next second's report
        assert (pool.model, pool.held, pool.arrived, pool.backlog_s) == ("m", 1, 1, None)
        assert pool.arrived_work_s > 0
        gateway.source.change([gateway.replicas[1].replica], models=("m",))
        assert (await first).json()["by"] == "b"
        await gateway.settled()


async def test_a_model_that_is_not_coming_is_a_503_at_once(front: Open, face: str) -> None:
    async with front(face, reports=True) as gateway:
        gateway.source.change([], models=("m",))
        while gateway.context.membership.replicas:
            await asyncio.sleep(0)
        answer = await gateway.post(BODY)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "no_replica")


@pytest.mark.parametrize("models", [("m",), ()], ids=["configured", "gone"])
async def test_those_that_wait_are_told_when_nobody_will_come(
    front: Open, face: str, models: tuple[str, ...]
) -> None:
    async with front(face, reports=True) as gateway:
        gateway.saturate("a", "b")
        waiting = await holding(gateway, 2)
        gateway.source.change([], models=models)
        for answer in await asyncio.gather(*waiting):
            assert (answer.status, answer.json()["error"]["code"]) == (503, "no_replica")
        await gateway.settled()
        assert outcomes(gateway) == {"no_replica": 2}


async def test_a_start_may_be_waited_for_longer_than_a_busy_replica(front: Open) -> None:
    queue = Queue(max_wait_s=0.05, max_start_wait_s=30.0)
    async with front(reports=True, queue=queue) as gateway:
        gateway.source.change([], models=("m",), coming=("m",))
        while not gateway.context.admission.is_coming("m"):
            await asyncio.sleep(0)
        (first,) = await holding(gateway, 1)
        (held,) = gateway.context.admission.lines["m"]
        assert held.deadline_s - held.since_s == pytest.approx(30.0)
        gateway.source.change([gateway.replicas[0].replica])
        assert (await first).status == 200


# --- ends


async def test_a_client_that_leaves_while_it_waits_frees_its_place(front: Open, face: str) -> None:
    async with front(face, reports=True) as gateway:
        gateway.saturate("a", "b")
        content = json.dumps(BODY).encode()
        _, writer = await gateway.connect()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
            % (len(content), content)
        )
        await gateway.until_held(1)
        writer.transport.abort()
        await gateway.until_held(0)
        await gateway.settled()
        assert outcomes(gateway) == {"left": 1}
        assert gateway.context.metrics.of("m").ended == {(499, "client_left"): 1}
        assert not any(replica.requests for replica in gateway.replicas)


@pytest.mark.parametrize("header", ["x-request-timeout", "X-Stainless-Read-Timeout"])
async def test_a_deadline_that_passes_while_it_waits_is_a_504(front: Open, face: str, header: str) -> None:
    async with front(face, reports=True) as gateway:
        gateway.saturate("a", "b")
        answer = await gateway.post(BODY, headers=f"connection: close\r\n{header}: 0.05\r\n")
        assert (answer.status, answer.json()["error"]["code"]) == (504, "queue_timeout")
        assert int(answer.headers["retry-after"]) >= 1
        await gateway.settled()
        assert outcomes(gateway) == {"expired": 1}


@pytest.mark.parametrize("value", ["", "None", "nan", "-3", "1e30", "abc"])
async def test_a_deadline_that_makes_no_sense_is_not_one(front: Open, value: str) -> None:
    async with front(reports=True) as gateway:
        gateway.saturate("a", "b")
        headers = f"connection: close\r\nx-request-timeout: {value}\r\n"
        waiting = asyncio.ensure_future(gateway.post(BODY, headers=headers))
        await gateway.until_held(1)
        (held,) = gateway.context.admission.lines["m"]
        assert held.deadline_s - held.since_s == pytest.approx(60.0)
        gateway.tell("a")
        assert (await waiting).status == 200


async def test_a_full_queue_takes_the_last_of_whoever_holds_most_and_refuses_it_more(
    front: Open, face: str
) -> None:
    async with front(face, reports=True, queue=Queue(max_requests=2)) as gateway:
        gateway.saturate("a", "b")
        first, last = await holding(gateway, 2, "big")
        refused = await gateway.post(BODY, headers=asked("big"))
        assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
        small = asyncio.ensure_future(gateway.post(BODY, headers=asked("small")))
        evicted = await last
        assert (evicted.status, evicted.json()["error"]["code"]) == (429, "queue_full")
        assert int(evicted.headers["retry-after"]) >= 1
        gateway.tell("a")
        assert [(await one).status for one in (first, small)] == [200, 200]
        await gateway.settled()
        assert outcomes(gateway) == {"refused": 1, "evicted": 1, "dispatched": 2}


async def test_a_body_that_can_never_wait_is_a_413(front: Open, face: str) -> None:
    async with front(face, reports=True, queue=Queue(max_bytes=1024)) as gateway:
        gateway.saturate("a", "b")
        answer = await gateway.post({**BODY, "prompt": "x" * 2000})
        assert answer.status == 413
        assert "retry-after" not in answer.headers
        await gateway.settled()


def test_a_turn_that_would_come_too_late_is_a_503_with_the_time_to_come_back() -> None:
    offer: Offer[Held] = Offer(None, "its turn would come in 90.0 s", 30.0, is_late=True)
    error = _refusal("m", offer)
    assert (error.status, error.code) == (503, "overloaded")
    assert getattr(error, "retry_after_s", None) == 30.0


async def test_a_shutdown_lets_in_who_finds_room_in_time(front: Open) -> None:
    async with front(num_replicas=1, reports=True) as gateway:
        gateway.saturate("a")
        (waiting,) = await holding(gateway, 1)
        stopping = asyncio.ensure_future(gateway.server.stop(drain_s=30))
        while not gateway.context.draining:
            await asyncio.sleep(0)
        gateway.tell("a")
        assert (await waiting).status == 200
        await stopping


async def test_a_shutdown_without_patience_tells_all(front: Open) -> None:
    async with front(reports=True) as gateway:
        gateway.saturate("a", "b")
        waiting = await holding(gateway, 2)
        context = gateway.context
        await gateway.server.stop()
        for answer in await asyncio.gather(*waiting):
            assert (answer.status, answer.json()["error"]["code"]) == (503, "shutting_down")
        context.check_integrity()
        assert (context.admission.num_waiting, context.metrics.in_flight) == (0, 0)


# --- again


async def test_a_request_that_lost_its_replica_waits_for_another_with_room(front: Open, face: str) -> None:
    async with front(face, reports=True) as gateway:
        gateway.saturate("b")
        waiting = asyncio.ensure_future(gateway.post({**BODY, "script": {"a": "reset"}}))
        await gateway.until_held(1)
        gateway.context.check_integrity()
        gateway.tell("a")  # tried already
        await asyncio.sleep(0)
        assert gateway.context.admission.num_waiting == 1
        gateway.tell("b")
        assert (await waiting).json()["by"] == "b"
        assert len(gateway.replicas[0].requests) == 1
        await gateway.settled()


async def test_who_comes_back_goes_before_those_that_have_not_had_their_turn(front: Open) -> None:
    async with front(reports=True, policy="least_loaded", queue=ONE_AT_A_TIME) as gateway:
        gateway.saturate("b")
        lost = asyncio.ensure_future(gateway.post({**BODY, "user": "lost", "script": {"a": "hang"}}))
        await gateway.replicas[0].started.wait()
        gateway.saturate("a")
        others = await holding(gateway, 2, user="other")
        gateway.source.change([gateway.replicas[1].replica])
        await gateway.until_held(3)
        gateway.tell("b")
        await asyncio.gather(lost, *others)
        assert [request["user"] for request in gateway.replicas[1].requests] == ["lost", "other", "other"]
        await gateway.settled()


async def test_who_comes_back_does_not_block_those_that_may_go_where_it_failed(front: Open) -> None:
    async with front(reports=True, queue=ONE_AT_A_TIME) as gateway:
        gateway.saturate("b")
        lost = asyncio.ensure_future(gateway.post({**BODY, "script": {"a": "reset"}}))
        await gateway.until_held(1)
        assert (await gateway.post(BODY)).json()["by"] == "a"
        gateway.tell("b")
        assert (await lost).json()["by"] == "b"
        await gateway.settled()


async def test_a_request_whose_only_replica_died_is_answered_by_its_next_start(
    front: Open, face: str
) -> None:
    async with front(face, num_replicas=1, reports=True) as gateway:
        (replica,) = gateway.replicas
        waiting = asyncio.ensure_future(gateway.post({**BODY, "script": {"a": "hang_once"}}))
        await replica.started.wait()
        gateway.source.change([], models=("m",), coming=("m",))
        await gateway.until_held(1)
        gateway.context.check_integrity()
        gateway.source.change([replace(replica.replica, boot_id=BootId("second"))])
        assert (await waiting).status == 200
        await gateway.settled()
        assert outcomes(gateway) == {"dispatched": 1}


async def test_a_reset_while_a_replica_is_coming_waits_for_it(front: Open, face: str) -> None:
    async with front(face, num_replicas=1, reports=True) as gateway:
        (replica,) = gateway.replicas
        gateway.source.change([replica.replica], coming=("m",))
        while not gateway.context.admission.is_coming("m"):
            await asyncio.sleep(0)
        waiting = asyncio.ensure_future(gateway.post({**BODY, "script": {"a": "reset_once"}}))
        await gateway.until_held(1)
        gateway.source.change([replace(replica.replica, boot_id=BootId("second"))])
        assert (await waiting).status == 200
        await gateway.settled()


async def test_a_replica_that_leaves_does_not_touch_a_request_that_has_left_it(front: Open) -> None:
    async with front(reports=True) as gateway:
        gateway.saturate("b")
        waiting = asyncio.ensure_future(gateway.post({**BODY, "script": {"a": "reset"}}))
        await gateway.until_held(1)
        gateway.source.change([gateway.replicas[1].replica])
        while len(gateway.context.membership.replicas) > 1:
            await asyncio.sleep(0)
        assert gateway.context.admission.num_waiting == 1
        gateway.tell("b")
        assert (await waiting).json()["by"] == "b"
        assert gateway.context.metrics.of("m").retries == 1
        await gateway.settled()


# --- seen from outside


async def test_the_queue_is_measured_without_labels_that_clients_invent(front: Open) -> None:
    async with front(reports=True, tenants=(Tenant(name="known"),)) as gateway:
        gateway.saturate("a", "b")
        waiting = [
            *await holding(gateway, 1, "known"),
            *await holding(gateway, 2, "invented"),
            *await holding(gateway, 1),
        ]
        page = await gateway.raw(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        lines = page.decode().splitlines()
        assert 'headrace_queue_requests{model="m",tenant="known"} 1.0' in lines
        assert 'headrace_queue_requests{model="m",tenant="other"} 2.0' in lines
        assert 'headrace_queue_requests{model="m",tenant="default"} 1.0' in lines
        assert "invented" not in page.decode()
        gateway.tell("a")
        await asyncio.gather(*waiting)
        page = await gateway.raw(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        lines = page.decode().splitlines()
        assert 'headrace_queue_requests{model="m",tenant="other"} 0.0' in lines
        assert 'headrace_queue_outcomes_total{model="m",outcome="dispatched",tenant="other"} 2.0' in lines
        assert 'headrace_queue_wait_seconds_count{model="m"} 4.0' in lines


class Nobody:
    """A waiter that is never let in."""

    def let_in(self, avoid: object) -> None:
        raise AssertionError

    def fail(self, error: object) -> None:
        raise AssertionError


def test_invented_tenants_share_one_name_beyond_a_bound() -> None:
    line = WaitingLine(QueueLimits(max_requests=4 * MOST_UNKNOWN), {"known": 1.0})
    waiting = []
    for number in range(2 * MOST_UNKNOWN):
        name = line.name(f"t{number}")
        held = Held(Nobody(), Request("m"), name, 1, 1, 0.0, 60.0)
        line.join(held, 0.0, 60.0)
        waiting.append(held)
        line.check_integrity()
    assert {held.tenant for held in waiting[MOST_UNKNOWN:]} == {OTHERS}
    assert line.name("known") == "known"
    assert line.name("t3") == "t3", "one that waits keeps its name"
    for held in waiting:
        assert line.leave(held)
        line.check_integrity()
    assert line.name("new") == "new"
