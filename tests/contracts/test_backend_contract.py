"""What every backend must do, whichever engine stands behind it.

A backend joins by a `Kind` in `KINDS`; kinds that are slow or need much carry a marker.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from headrace.backends import embedded_model
from headrace.backends.base import Backend, Started
from headrace.backends.external import ExternalBackend
from headrace.backends.load_publisher import decode_report
from headrace.backends.simulated import SimulatedBackend
from headrace.backends.vllm import VllmBackend
from headrace.backends.vllm_arguments import EngineSettings
from headrace.config import SimulatedEngine
from headrace.errors import SleepFailed
from headrace_router.types import LoadReport, ReplicaId

TOKEN = "the-fleet's-own"
MODEL = "contract"
PATIENCE_S = 60.0
PLACES = 24  # of a batch
SAY = [{"role": "user", "content": "Say something long about rivers."}]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Kind:
    """How to make one kind of backend, not yet started, and what it promises beyond the rest."""

    make: Callable[[], AbstractAsyncContextManager[Backend]]
    owns_server: bool = True  # its start begins, and its stop ends, the server
    publishes_load: bool = True  # over ZMQ; otherwise `load()` alone tells
    can_sleep: bool = False


def simulated_backend() -> SimulatedBackend:
    settings = SimulatedEngine.model_validate(
        {"step_s": 0.002, "max_model_len": 2048, "num_blocks": 1024, "max_running": PLACES}
    )
    return SimulatedBackend(settings, MODEL, ReplicaId("simulated-0"), internal_token=TOKEN)


@asynccontextmanager
async def simulated() -> AsyncIterator[Backend]:
    backend = simulated_backend()
    yield backend
    await backend.stop()


@asynccontextmanager
async def external() -> AsyncIterator[Backend]:
    server = simulated_backend()
    started = await server.start(lambda _phase: None)
    backend = ExternalBackend(started.endpoints.url, MODEL, TOKEN, report_interval_s=0.02)
    yield backend
    await backend.stop()
    await server.stop()


@asynccontextmanager
async def vllm() -> AsyncIterator[Backend]:
    # float32: prefill and decode round alike, so that what is asserted equal is equal.
    arguments = {
        "max_model_len": 2048,
        "block_size": 32,
        "kv_cache_memory_bytes": 256 * 1024**2,
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": PLACES,
    }
    core = min(os.sched_getaffinity(0))
    backend = VllmBackend(
        EngineSettings(MODEL, embedded_model.SOURCE, arguments),
        ReplicaId("vllm-0"),
        "127.0.0.1",
        TOKEN,
        cores=((core,),),
    )
    yield backend
    await backend.stop()


KINDS = [
    pytest.param(Kind(simulated, can_sleep=True), id="simulated"),
    pytest.param(Kind(external, owns_server=False, publishes_load=False), id="external"),
    pytest.param(Kind(vllm), id="vllm", marks=pytest.mark.vllm),
]


class Subject:
    """A started backend and clients for it."""

    def __init__(self, kind: Kind, backend: Backend, started: Started, phases: list[str]) -> None:
        self.kind = kind
        self.backend = backend
        self.started = started
        self.phases = phases
        self.url = started.endpoints.url
        self.client = openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=TOKEN, max_retries=0)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of a raw POST."""
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)

        def send() -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as e:
                with e:
                    return e.code, e.read()

        return await asyncio.to_thread(send)

    async def wait_load(self, holds: Callable[[LoadReport], bool]) -> LoadReport:
        """The first report of which `holds` is true."""
        async with asyncio.timeout(PATIENCE_S):
            if self.kind.publishes_load:
                async for report in self.reports():
                    if holds(report):
                        return report
            while (newest := self.backend.load()) is None or not holds(newest):
                await self.backend.check()  # a round trip to the server: time passes without a sleep
        return newest

    async def reports(self) -> AsyncIterator[LoadReport]:
        """Reports as a gateway receives them."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.subscribe(b"")
            socket.connect(self.started.endpoints.load or "")
            while True:
                yield decode_report(await socket.recv())


async def begin(kind: Kind, stack: AsyncExitStack) -> Subject:
    backend = await stack.enter_async_context(kind.make())
    phases: list[str] = []
    subject = Subject(kind, backend, await backend.start(phases.append), phases)
    stack.push_async_callback(subject.client.close)
    return subject


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(kind: Kind) -> AsyncIterator[Subject]:
    """One started backend for all tests that do not stop it."""
    async with AsyncExitStack() as stack:
        yield await begin(kind, stack)


async def test_start_tells_phases_endpoints_and_sizes(subject: Subject) -> None:
    assert subject.phases
    assert [name for name, _ in subject.started.phases_s]
    assert all(elapsed_s >= 0 for _, elapsed_s in subject.started.phases_s)
    assert subject.url.startswith("http://")
    assert not subject.url.endswith("/")
    assert (subject.started.max_model_len or 0) > 0
    if subject.kind.owns_server:
        assert (subject.started.block_size or 0) > 0
        assert (subject.started.num_blocks or 0) > 0
        assert subject.started.max_running == PLACES
    else:
        assert subject.started.max_running is None
    assert (subject.started.endpoints.load is not None) == subject.kind.publishes_load
    await subject.backend.check()


async def test_models_lists_the_served_name(subject: Subject) -> None:
    assert [model.id for model in (await subject.client.models.list()).data] == [MODEL]


async def test_chat_answers_with_usage(subject: Subject) -> None:
    answer = await subject.client.chat.completions.create(
        model=MODEL, messages=SAY, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


async def test_streamed_chat_says_the_same_with_usage_last(subject: Subject) -> None:
    ask = {
        "model": MODEL,
        "messages": SAY,
        "max_tokens": 8,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = await subject.client.chat.completions.create(**ask)
    stream = await subject.client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


async def test_completions_take_text_and_token_ids(subject: Subject) -> None:
    for prompt in ("Once upon a time", [21, 22, 23, 24, 25]):
        ask = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": 6,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = await subject.client.completions.create(**ask)
        stream = await subject.client.completions.create(**ask, stream=True)
        parts = [chunk.choices[0].text async for chunk in stream if chunk.choices]
        assert "".join(parts) == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6
    assert whole.usage.prompt_tokens == 5


async def test_a_repeated_prompt_is_found_in_the_cache(subject: Subject) -> None:
    prompt = [300 + index for index in range(600)]
    for _ in range(2):
        answer = await subject.client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert 0 < (answer.usage.prompt_tokens_details.cached_tokens or 0) < 600


async def test_mistakes_get_openai_error_bodies(subject: Subject) -> None:
    long = (subject.started.max_model_len or 0) + 1
    cases = {
        b'{"model": ': 400,
        b"{}": 400,
        json.dumps({"model": MODEL, "prompt": [7] * long}).encode(): 400,
        json.dumps({"model": "no-such-model", "prompt": "x"}).encode(): 404,
    }
    for body, expected in cases.items():
        status, answer = await subject.post("/v1/completions", body)
        assert status == expected, body[:40]
        error = json.loads(answer)["error"]
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert "Traceback" not in answer.decode()
    await subject.backend.check()


async def test_without_the_key_nobody_is_answered(subject: Subject) -> None:
    async with openai.AsyncOpenAI(base_url=subject.url + "/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_load_is_reported_on_change_and_as_heartbeat(subject: Subject) -> None:
    if not subject.kind.publishes_load:
        await subject.wait_load(lambda report: report.running == 0)
        return
    before = await subject.wait_load(lambda report: report.running == 0)
    await subject.client.completions.create(model=MODEL, prompt=[9] * 40, max_tokens=4)
    after = await subject.wait_load(
        lambda report: report.prompt_tokens_total >= before.prompt_tokens_total + 40
    )
    assert after.boot_id == subject.started.boot_id
    assert after.generation_tokens_total > before.generation_tokens_total
    assert after.sequence > before.sequence
    sequences: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        async for report in subject.reports():
            sequences.append(report.sequence)
            if len(sequences) == 4:
                break
    assert sequences == list(range(sequences[0], sequences[0] + 4))


async def test_a_client_that_leaves_frees_its_place(subject: Subject) -> None:
    before = await subject.wait_load(lambda report: report.running + report.waiting == 0)
    stream = await subject.client.completions.create(
        model=MODEL, prompt="Never ending", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    await subject.wait_load(lambda report: report.running == 1)
    await stream.close()
    after = await subject.wait_load(lambda report: report.running == 0)
    assert after.waiting == 0
    if subject.kind.publishes_load:
        assert after.generation_tokens_total - before.generation_tokens_total < 1400, "it ran to its end"


async def test_who_cannot_sleep_says_so_and_serves_on(subject: Subject) -> None:
    if subject.kind.can_sleep:
        return
    with pytest.raises(SleepFailed):
        await subject.backend.sleep()
    await subject.backend.wake()
    answer = await subject.client.completions.create(model=MODEL, prompt="Still here", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


async def test_nobody_sleeps_while_requests_run(subject: Subject) -> None:
    stream = await subject.client.completions.create(
        model=MODEL, prompt="Wide awake", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = aiter(stream)
    await anext(chunks)
    with pytest.raises(SleepFailed):
        await subject.backend.sleep()
    rest = [chunk async for chunk in chunks]
    assert rest[-1].choices[0].finish_reason == "length"
    await subject.client.models.list()


async def test_asleep_it_refuses_and_awake_it_is_the_same_with_an_empty_cache(subject: Subject) -> None:
    if not subject.kind.can_sleep:
        return
    ask: dict[str, Any] = {"model": MODEL, "prompt": [500 + index for index in range(300)], "max_tokens": 8}
    before = [await subject.client.completions.create(**ask, temperature=0) for _ in range(2)][1]
    assert before.usage is not None and before.usage.prompt_tokens_details is not None
    assert before.usage.prompt_tokens_details.cached_tokens
    await subject.wait_load(lambda report: report.running + report.waiting == 0)
    for _ in range(2):
        await subject.backend.sleep()
        with pytest.raises(openai.InternalServerError) as refused:
            await subject.client.completions.create(**ask)
        assert refused.value.status_code == 503
    await subject.backend.check()
    for _ in range(2):
        await subject.backend.wake()
    after = await subject.client.completions.create(**ask, temperature=0)
    assert after.choices[0].text == before.choices[0].text
    assert after.usage is not None
    assert not after.usage.prompt_tokens_details or not after.usage.prompt_tokens_details.cached_tokens


async def test_it_can_be_stopped_asleep(kind: Kind) -> None:
    if not kind.can_sleep:
        return
    async with AsyncExitStack() as stack:
        subject = await begin(kind, stack)
        await subject.backend.sleep()
        await subject.backend.stop(drain_s=PATIENCE_S)
        with pytest.raises(openai.APIConnectionError):
            await subject.client.models.list()


async def test_stop_drains_then_releases_and_the_next_start_is_another_boot(kind: Kind) -> None:
    async with AsyncExitStack() as stack:
        first = await begin(kind, stack)
        stream = await first.client.completions.create(
            model=MODEL, prompt="To the end", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = aiter(stream)
        seen = [await anext(chunks)]
        stopping = asyncio.create_task(first.backend.stop(drain_s=PATIENCE_S))
        seen.append(await anext(chunks))
        if kind.owns_server:
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                await first.client.completions.create(model=MODEL, prompt="Too late", max_tokens=1)
        seen += [chunk async for chunk in chunks]
        assert seen[-1].choices[0].finish_reason == "length"
        await stopping
        await first.backend.stop()
        if kind.owns_server:
            with pytest.raises(openai.APIConnectionError):
                await first.client.models.list()
        else:
            await first.client.models.list()
        second = await begin(kind, stack)
        assert second.started.boot_id != first.started.boot_id
        await second.backend.stop()
        await second.backend.stop()


async def test_stop_without_start_is_safe(kind: Kind) -> None:
    async with kind.make() as backend:
        await backend.stop()
        await backend.stop(drain_s=1.0)
