"""What two replicas that hand prompts over must do, whichever engine stands behind them."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from headrace.backends.kv_connectors import NIXL
from headrace.backends.simulated import SimulatedBackend
from headrace.config import SimulatedEngine
from headrace_bench.real_fleet import real_fleet
from headrace_bench.real_replica import MODEL
from headrace_router.types import LoadReport, ReplicaId

PATIENCE_S = 60.0
FIRST = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Pair:
    """Where the two listen, and their newest load reports."""

    prefill: str
    decode: str
    load: Callable[[str], LoadReport | None]

    async def post(self, url: str, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, Any]:
        content = json.dumps({"model": MODEL, "temperature": 0, "ignore_eos": True, **body}).encode()
        request = urllib.request.Request(url + path, content, {"content-type": "application/json"})

        def send() -> tuple[int, Any]:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                    return answer.status, json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.loads(error.read() or b"null")

        return await asyncio.to_thread(send)

    async def answer(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        status, told = await self.post(url, body)
        assert status == 200, told
        found: dict[str, Any] = told
        return found

    async def release(self, params: dict[str, Any]) -> None:
        status, _ = await self.post(
            self.prefill, {"request_ids": [params["remote_request_id"]]}, "/headrace/release_kv"
        )
        assert status == 200

    async def until(self, url: str, holds: Callable[[LoadReport], bool]) -> LoadReport:
        async with asyncio.timeout(PATIENCE_S):
            while (report := self.load(url)) is None or not holds(report):
                await asyncio.sleep(0)
        return report


@asynccontextmanager
async def simulated(_: Path) -> AsyncIterator[Pair]:
    settings = SimulatedEngine.model_validate({"step_s": 0.002, "max_model_len": 2048, "num_blocks": 1024})
    backends = [
        SimulatedBackend(settings, MODEL, ReplicaId(name), kv_connector=NIXL, report_interval_s=0.02)
        for name in "pd"
    ]
    try:
        urls = [(await backend.start(lambda _phase: None)).endpoints.url for backend in backends]
        by_url = dict(zip(urls, backends, strict=True))
        yield Pair(urls[0], urls[1], lambda url: by_url[url].load())
    finally:
        for backend in backends:
            await backend.stop()


@asynccontextmanager
async def vllm(folder: Path) -> AsyncIterator[Pair]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas need two cores")
    async with real_fleet(2, 256 * 1024**2, folder, NIXL) as fleet:
        assert {replica.kv_connector for replica in fleet.replicas} == {NIXL}
        names = {replica.endpoints.url: replica.id for replica in fleet.replicas}
        yield Pair(*fleet.urls, lambda url: fleet.newest.get(names[url]))


KINDS = [
    pytest.param(simulated, id="simulated"),
    pytest.param(vllm, id="vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(400)]),
]
Kind = Callable[[Path], AbstractAsyncContextManager[Pair]]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    kind: Kind = request.param
    async with kind(tmp_path_factory.mktemp("replicas")) as started:
        yield started


def prompt(number: int, length: int = 500) -> list[int]:
    return [1000 + (number * 7919 + index * 31) % 20000 for index in range(length)]


async def test_the_first_half_holds_its_blocks_until_the_second_has_them(pair: Pair) -> None:
    first = await pair.answer(pair.prefill, {"prompt": prompt(1), **FIRST})
    params = first["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    assert params["remote_request_id"]
    await pair.until(pair.prefill, lambda report: report.kv_use > 0 and report.running == 0)
    body = {"prompt": prompt(1), "max_tokens": 8, "kv_transfer_params": params}
    second = await pair.answer(pair.decode, body)
    assert second["usage"]["prompt_tokens"] == 500
    assert second["usage"]["completion_tokens"] == 8
    await pair.until(pair.prefill, lambda report: report.kv_use == 0)
    await pair.until(pair.decode, lambda report: report.kv_use == 0)


async def test_cached_tokens_are_those_of_the_first_half(pair: Pair) -> None:
    for cached in (False, True):
        first = await pair.answer(pair.prefill, {"prompt": prompt(2), **FIRST})
        body = {"prompt": prompt(2), "max_tokens": 2, "kv_transfer_params": first["kv_transfer_params"]}
        second = await pair.answer(pair.decode, body)
        told = [half["usage"]["prompt_tokens_details"]["cached_tokens"] for half in (first, second)]
        assert told[0] == told[1]
        assert (told[0] > 400) == cached


async def test_released_blocks_are_free_at_once(pair: Pair) -> None:
    first = await pair.answer(pair.prefill, {"prompt": prompt(4), **FIRST})
    await pair.until(pair.prefill, lambda report: report.kv_use > 0 and report.running == 0)
    await pair.release(first["kv_transfer_params"])
    await pair.until(pair.prefill, lambda report: report.kv_use == 0)
    await pair.release(first["kv_transfer_params"])  # twice is harmless


async def test_a_holder_that_is_gone_costs_time_but_no_answer(pair: Pair) -> None:
    first = await pair.answer(pair.prefill, {"prompt": prompt(5), **FIRST})
    gone = {**first["kv_transfer_params"], "remote_engine_id": "nobody", "remote_port": 1}
    body = {"prompt": prompt(5), "max_tokens": 4, "kv_transfer_params": gone}
    second = await pair.answer(pair.decode, body)
    assert second["usage"]["completion_tokens"] == 4
    await pair.release(first["kv_transfer_params"])
    await pair.until(pair.prefill, lambda report: report.kv_use == 0)


async def test_a_first_half_that_is_refused_holds_nothing(pair: Pair) -> None:
    status, told = await pair.post(pair.prefill, {"prompt": prompt(6, 5000), **FIRST})
    assert status == 400
    assert "maximum context length" in told["error"]["message"]
    await pair.until(pair.prefill, lambda report: report.kv_use == 0)
