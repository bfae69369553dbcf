"""Prefill and decode on two real vLLM replicas, KV blocks by NIXL.

One fleet for all tests, as configs/disaggregated.yaml has it; in float32, where the same tokens give the same answer
whichever engine computed the prompt.
"""

import asyncio
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from headrace import explain_command

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

Serving = Callable[..., AbstractContextManager[Any]]

MODEL = "smollm2"
CONFIG = Path(__file__).parents[2] / "configs" / "disaggregated.yaml"
WORDS = "the river runs to the sea and the mill turns its stone in the water while the miller sleeps "


@pytest.fixture(scope="module")
def fleet(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = yaml.safe_load(CONFIG.read_text())
    for pool in config["models"][0]["pools"]:
        pool["engine"]["dtype"] = "float32"
    config["gateway"]["disaggregation"] = "always_remote"
    path = tmp_path_factory.mktemp("config") / "disaggregated.yaml"
    path.write_text(yaml.safe_dump(config))
    with serving(path, "--port", "0") as served:
        assert served.url
        yield served


@pytest.fixture
def client(fleet: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def replicas(fleet: Any) -> dict[str, dict[str, Any]]:
    """As they started, by role. Asked once: `headrace status` joins the cluster, which takes seconds here."""
    return {row["role"]: row for row in fleet.status()["replicas"]}


def gateway_metric(fleet: Any, name: str, *labels: str) -> float:
    with urllib.request.urlopen(fleet.url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(name + "{") and all(label in line for label in labels)
    )


def handed_over(fleet: Any, outcome: str = "completed") -> float:
    return gateway_metric(fleet, "headrace_handovers_total", f'outcome="{outcome}"')


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to hold"
        time.sleep(0.1)


def nothing_is_held(fleet: Any) -> bool:
    return gateway_metric(fleet, "headrace_replica_kv_use") == 0


def prompt(num_tokens: int, start: int = 0) -> list[int]:
    """As many token ids as said; `start` keeps prompts out of each other's cache."""
    return [1000 + (start * 7919 + index * 31) % 20000 for index in range(num_tokens)]


async def complete(client: openai.AsyncOpenAI, tokens: list[int], **more: Any) -> Any:
    more = {"max_tokens": 12, "temperature": 0, **more}
    return await client.completions.create(model=MODEL, prompt=tokens, **more)


@pytest.mark.timeout(900)
async def test_answers_are_those_of_one_replica_alone(fleet: Any, client: openai.AsyncOpenAI) -> None:
    """`IDENTITY_PROMPTS=50` asks that many, of 1 to 1,500 tokens; 7 at the edges of blocks otherwise."""
    before = handed_over(fleet)
    wanted = int(os.environ.get("IDENTITY_PROMPTS", "0"))
    lengths = [1 + 1499 * at // (wanted - 1) for at in range(wanted)] or [1, 31, 32, 33, 200, 700, 1500]
    for number, length in enumerate(lengths):
        tokens = prompt(length, number)
        apart = await complete(client, tokens)
        # What asks for its prompt back stays on one replica, and the salt keeps it from what that has received.
        whole = await complete(client, tokens, extra_body={"echo": True, "cache_salt": "alone"})
        whole_text = whole.choices[0].text
        assert whole_text.endswith(apart.choices[0].text), length
        assert apart.usage.prompt_tokens == whole.usage.prompt_tokens == length
        assert apart.usage.completion_tokens == whole.usage.completion_tokens
    assert handed_over(fleet) == before + len(lengths)


async def test_the_decoding_replica_received_what_it_did_not_compute(
    fleet: Any, client: openai.AsyncOpenAI, replicas: dict[str, dict[str, Any]]
) -> None:
    """In the words of vLLM's own transfer statistics, which come with its load reports."""
    assert set(replicas) == {"prefill", "decode"}

    def received() -> float:
        return gateway_metric(fleet, "headrace_replica_received_tokens_total", "smollm2-decode-0")

    before = received()
    await complete(client, prompt(800, 50))
    await asyncio.to_thread(wait_until, lambda: received() >= before + 700, 10)


async def test_cached_tokens_and_streams_are_as_from_one_replica(client: openai.AsyncOpenAI) -> None:
    tokens = prompt(500, 60)
    first = await complete(client, tokens)
    second = await complete(client, tokens)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 480
    stream = await complete(client, tokens, stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    async for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == first.choices[0].text
    assert usage.completion_tokens == first.usage.completion_tokens


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
ODD: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"n": 2, "temperature": 1.0},
    {"logprobs": True, "top_logprobs": 2},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": WORDS * 200}]},
    {"max_tokens": 100_000},
    {"temperature": -1},
    {"stop": ["."], "seed": 7, "temperature": 0.8},
]


@pytest.mark.parametrize("odd", ODD, ids=",".join)
async def test_odd_requests_are_answered_or_refused_clearly(
    client: openai.AsyncOpenAI, odd: dict[str, Any]
) -> None:
    body = {"messages": [{"role": "user", "content": WORDS * 8}], "max_tokens": 16, "temperature": 0, **odd}
    messages = body.pop("messages")
    try:
        answer = await client.chat.completions.create(model=MODEL, messages=messages, **body)
    except openai.APIStatusError as error:
        assert 400 <= error.status_code < 500, error
        assert len(error.message) > 10
    else:
        assert len(answer.choices) == body.get("n", 1)
        assert answer.usage.completion_tokens >= 1


async def test_a_client_that_leaves_holds_nothing(fleet: Any, client: openai.AsyncOpenAI) -> None:
    leaving = [asyncio.create_task(complete(client, prompt(1200, 70 + n), max_tokens=100)) for n in range(4)]
    await asyncio.wait(leaving, timeout=1.5)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: nothing_is_held(fleet), 10)


async def test_explain_tells_both_halves(fleet: Any, client: openai.AsyncOpenAI) -> None:
    await complete(client, prompt(300, 90))
    (entry,) = explain_command.fetch(fleet.url, 1)
    assert entry["replica"] == "smollm2-decode-0"
    assert entry["prefill"]["replica"] == "smollm2-prefill-0"


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_killed_replica_costs_no_answer_and_holds_nothing(
    fleet: Any, client: openai.AsyncOpenAI, replicas: dict[str, dict[str, Any]], role: str
) -> None:
    victim = replicas[role]
    # The second time, until the first one's successor is there.
    await asyncio.to_thread(wait_until, lambda: gateway_metric(fleet, "headrace_replica_up") == 2, 200)
    offset = {"prefill": 100, "decode": 120}[role]
    asked = [asyncio.create_task(complete(client, prompt(900, offset + n), max_tokens=8)) for n in range(8)]
    await asyncio.wait(asked, timeout=1.0)
    assert not all(task.done() for task in asked)
    os.kill(victim["pid"], signal.SIGKILL)
    for answer in await asyncio.gather(*asked):
        assert answer.usage.completion_tokens >= 1
    await asyncio.to_thread(wait_until, lambda: nothing_is_held(fleet), 10)
