"""Our tokens, and the hits that the index predicts from them, against a real engine's own report."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from headrace.gateway.kv_feed import KvFeed
from headrace.gateway.prompt_reader import Prompt, PromptReader
from headrace.gateway.token_choice import How
from headrace.gateway.tokenizer_folder import load, locate
from headrace_router.prefix_index import PrefixIndex
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, Request, Role

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

STORY = (
    "A headrace is the channel that brings water to the turbines. Above it lies the forebay, behind it the penstock; "
    "what leaves the turbines runs through the tailrace back into the river. "
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def chats() -> list[dict[str, Any]]:
    """Chat requests of every kind whose prompt can be known; later ones share beginnings with earlier ones."""
    system = {"role": "system", "content": "You are a hydraulic engineer. " + STORY * 3}
    conversation: list[dict[str, Any]] = [system]
    requests: list[dict[str, Any]] = []
    for turn in range(8):
        conversation = [*conversation, user(f"Question {turn}: what comes after the forebay? {STORY}")]
        requests.append({"messages": conversation})
        conversation = [*conversation, {"role": "assistant", "content": f"Answer {turn}: the penstock."}]
    requests += [
        {"messages": [user(STORY)]},
        {"messages": [user(STORY + "日本の川 🙂🙃 Ünïcödé \u202e\u0301")]},
        {"messages": [user([{"type": "text", "text": STORY}, {"type": "text", "text": "Part two."}])]},
        {"messages": [user(["plain", {"type": "text", "text": STORY}])]},
        {"messages": [system, user("<|im_end|>\n<|im_start|>system\nspecial tokens in text")]},
        {"messages": [system, user("a  b\t\n\n   c\r\n")]},
        {"messages": [user(STORY)], "tools": [TOOL]},
        {"messages": [user(STORY)], "tools": [TOOL], "tool_choice": "none"},
        {
            "messages": [
                user("Weather?"),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
                user(STORY),
            ],
            "tools": [TOOL],
        },
        {"messages": [system, {"role": "developer", "content": "Be brief."}, user(STORY)]},
        {"messages": [user(STORY)], "add_generation_prompt": False},
        {
            "messages": [user(STORY), {"role": "assistant", "content": "The penstock "}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
        {"messages": [user(STORY)], "add_special_tokens": True},
        {"messages": [user(STORY)], "reasoning_effort": "low"},
        {"messages": [user(STORY)], "chat_template_kwargs": {"add_nothing": 1}},
        {"messages": [user(STORY)], "cache_salt": "tenant-a"},
        {"messages": [user(STORY)], "cache_salt": "tenant-a"},
        {"messages": [user(STORY, name="Ann")]},
        {"messages": [user("x" * 900)]},
        {"messages": [user("def f(x):\n    return {'a': [x, 1.0e-3]}\n" * 12)]},
    ]
    return requests


def completions() -> list[dict[str, Any]]:
    return [
        {"prompt": STORY},
        {"prompt": STORY * 4},
        {"prompt": STORY * 5},
        {"prompt": [STORY]},
        {"prompt": list(range(100, 300))},
        {"prompt": [list(range(100, 400))]},
        {"prompt": "<|im_start|>user\n" + STORY},
        {"prompt": STORY, "add_special_tokens": False},
        {"prompt": "日本語のテキスト " * 30},
        {"prompt": "tiny"},
        {"prompt": [STORY, STORY + "Another."]},
        {"prompt": STORY * 4, "cache_salt": "tenant-b"},
    ]


class Engine(NamedTuple):
    replica: Replica

    def ask(self, path: str, body: bytes) -> dict[str, Any]:
        request = urllib.request.Request(
            self.replica.endpoints.url + path, body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    host = Path(__file__).with_name("vllm_host.py")
    process = subprocess.Popen(
        [sys.executable, str(host)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        told: dict[str, Any] = {}
        for line in process.stdout:
            if b'{"ready"' in line:  # the engine's processes write there too, and end no lines for us
                told = json.loads(line[line.index(b'{"ready"') :])
                break
        assert told, "the engine did not start"
        replica = Replica(
            ReplicaId("m-0"),
            BootId(told["boot_id"]),
            "m",
            Role.UNIFIED,
            Endpoints(**told["endpoints"]),
            block_size=told["block_size"],
        )
        yield Engine(replica)
        process.stdin.close()
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Outcome(NamedTuple):
    body: dict[str, Any]
    how: How
    same: bool
    predicted: int
    cached: int
    counted: int


async def test_tokens_and_hits_are_the_engines(engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    reader, index = PromptReader(loop), PrefixIndex(num_slots=1, max_blocks=1 << 14)
    known = reader.of("m")
    known.tokenizer = load(locate("embedded", {}))
    engine.ask("/v1/completions", json.dumps({"model": "m", "prompt": STORY * 2, "max_tokens": 1}).encode())
    index.follow([(engine.replica, 0)])
    feed = KvFeed(loop, index)
    feed.follow(Membership(1, (engine.replica,)))
    outcomes = []
    try:
        for path, requests in (("/v1/chat/completions", chats()), ("/v1/completions", completions())):
            outcomes += [await _compare(engine, reader, index, feed, path, request) for request in requests]
        index.check_integrity()
    finally:
        feed.stop()
        reader.close()
    assert len(outcomes) >= 40
    wrong = [outcome for outcome in outcomes if not outcome.same]
    assert not wrong, wrong
    assert known.check.mismatched == 0 and known.check.checked >= 39
    predicted, cached = (
        sum(getattr(outcome, field) for outcome in outcomes) for field in ("predicted", "cached")
    )
    print(
        f"{len(outcomes)} requests: {predicted} hit tokens predicted, {cached} reported; {feed.counts}; {index.counts}"
    )
    assert cached > 1000
    assert [outcome for outcome in outcomes if outcome.predicted != outcome.cached] == []
    assert feed.counts.given_up == feed.counts.unreadable == 0
    assert index.counts.removed > 0, "the cache was meant to be too small for everything"


async def _compare(
    engine: Engine, reader: PromptReader, index: PrefixIndex, feed: KvFeed, path: str, request: dict[str, Any]
) -> Outcome:
    body = {"model": "m", "max_tokens": 4, "temperature": 0, "return_token_ids": True, **request}
    encoded = json.dumps(body).encode()
    prompt = reader.read("m", path.encode(), encoded, block_size=4, prefill_tokens_per_s=100.0)
    if not isinstance(prompt, Prompt):
        prompt = await prompt
    predicted = 0
    if prompt.token_ids is not None and not _has_several(request):
        hashes = prompt.block_hashes("m", index.block_sizes("m"))
        hits = index.look_up(
            Request("m", len(encoded), prompt_tokens=prompt.num_tokens, block_hashes=hashes), 0.0
        )
        predicted = 0 if hits is None else int(hits.tokens[0])
    answer = await asyncio.to_thread(engine.ask, path, encoded)
    usage = answer["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if _has_several(request):
        predicted = cached  # siblings of one request may or may not meet in the cache
    reader.of("m").settle(prompt, predicted, usage["prompt_tokens"], cached)
    theirs = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
    same = prompt.token_ids is not None and np.array_equal(prompt.token_ids, theirs)
    # The engine tells of its blocks at its next step; the publisher's thread sends them within moments.
    for _ in range(20):
        feed.tick()
        await asyncio.sleep(0.01)
    return Outcome(request, prompt.choice.how, same, predicted, cached, usage["prompt_tokens"])


def _has_several(request: dict[str, Any]) -> bool:
    prompt = request.get("prompt")
    return isinstance(prompt, list) and isinstance(prompt[0], str) and len(prompt) > 1
