"""Real vLLM replicas, end to end: the project's main job.

One fleet for all tests, two replicas of the embedded model on two cores, as configs/local.yaml has them.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from headrace.fleet import warden

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

Serving = Callable[..., AbstractContextManager[Any]]
Ends = Callable[[int], Callable[[], bool]]

MODEL = "smollm2"
CONFIG = Path(__file__).parents[2] / "configs" / "local.yaml"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def fleet(serving: Serving) -> Iterator[Any]:
    with serving(CONFIG, "--port", "0") as served:
        assert served.url
        yield served


@pytest.fixture
def client(fleet: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0, timeout=120)


def test_progress_names_phases_before_it_is_ready(fleet: Any) -> None:
    fleet.wait_line(r"smollm2-unified-0: starting, .* \(\d+ s\)")
    fleet.wait_line(r"^try:   curl http://127")


def test_chat_answers_rightly_and_with_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, max_tokens=20, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=FRANCE,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert chunks[-1].usage is not None


def test_completions_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=8, temperature=0)
    assert whole.choices[0].text
    stream = client.completions.create(
        model=MODEL, prompt="One, two, three,", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_models_lists_the_served_name_once(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_mistakes_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=FRANCE)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=MODEL, prompt="word " * 3000, max_tokens=1)
    bad = client._client.post("chat/completions", content=b'{"model": ')
    assert bad.status_code == 400
    assert bad.json()["error"]["message"]


def test_the_engines_control_endpoints_are_not_there(client: openai.OpenAI) -> None:
    root = str(client.base_url).removesuffix("/v1/")
    for path in ("/sleep", "/collective_rpc", "/reset_prefix_cache", "/v1/load_lora_adapter", "/server_info"):
        assert client._client.post(root + path, json={}).status_code in (404, 405), path


def test_a_replica_answers_nobody_without_the_fleets_token(fleet: Any, client: openai.OpenAI) -> None:
    for replica in fleet.status()["replicas"]:
        for path in ("/health", "/v1/models", "/metrics"):
            assert client._client.get(replica["url"] + path).status_code == 401


async def test_a_client_that_leaves_during_prefill_frees_the_engine(fleet: Any) -> None:
    async with openai.AsyncOpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0) as client:
        leaving = asyncio.create_task(
            client.completions.create(model=MODEL, prompt="leave " * 1700, max_tokens=300)
        )
        await asyncio.wait([leaving], timeout=0.3)
        leaving.cancel()
    for _ in range(10):
        load = [
            row["running"] + row["waiting"]
            for row in await asyncio.to_thread(lambda: fleet.status()["replicas"])
        ]
        if not any(load):
            return
    pytest.fail(f"still running or waiting: {load}")


def test_a_killed_replica_costs_no_unanswered_request_and_the_fleet_is_whole_again(
    fleet: Any, ends: Ends
) -> None:
    victim = fleet.status()["replicas"][0]
    said = len(fleet.lines)
    family = _descendants(victim["pid"])
    assert len(family) >= 2, "the engine core and its worker"
    gone = [ends(pid) for pid in (victim["pid"], *family)]

    async def kill_under_requests() -> list[int]:
        async with openai.AsyncOpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0) as client:
            asking = [asyncio.create_task(_ask_8_tokens(client, number)) for number in range(12)]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            more = [asyncio.create_task(_ask_8_tokens(client, number)) for number in range(12, 18)]
            os.kill(victim["pid"], signal.SIGKILL)
            return await asyncio.gather(*asking, *more)

    assert asyncio.run(kill_under_requests()) == [8] * 18
    assert all(wait() for wait in gone), "something of vLLM outlived its actor"
    fleet.wait_line(rf"{victim['id']}: .*its process died", 60, said)
    fleet.wait_line(rf"{victim['id']}: ready after", 280, said)
    replicas = fleet.status()["replicas"]
    assert [replica["state"] for replica in replicas] == ["ready", "ready"]
    assert replicas[0]["boot_id"] != victim["boot_id"]


def test_an_engine_that_dies_takes_its_replica_along_and_costs_no_unanswered_request(
    fleet: Any, ends: Ends
) -> None:
    victim = fleet.status()["replicas"][1]
    said = len(fleet.lines)
    gone = ends(victim["pid"])
    (core,) = [pid for pid in _descendants(victim["pid"]) if "EngineCore" in _name(pid)]

    async def kill_under_requests() -> list[int]:
        async with openai.AsyncOpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0) as client:
            asking = [asyncio.create_task(_ask_8_tokens(client, number)) for number in range(12)]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            more = [asyncio.create_task(_ask_8_tokens(client, number)) for number in range(12, 18)]
            os.kill(core, signal.SIGKILL)
            return await asyncio.gather(*asking, *more)

    assert asyncio.run(kill_under_requests()) == [8] * 18
    assert gone(), "the actor outlived its engine"
    fleet.wait_line(rf"{victim['id']}: .*the engine process died", 60, said)


def test_ctrl_c_while_a_replica_starts_again_ends_all_of_it(fleet: Any) -> None:
    owned = warden.shared_memory(fleet.mark)
    assert owned
    assert fleet.end(signal.SIGINT, whole_group=True) == 0
    assert fleet.left_behind() == []
    assert not [entry.name for entry in os.scandir("/dev/shm") if entry.inode() in owned]
    assert not any("Traceback" in line for line in fleet.lines), "\n".join(fleet.lines)


async def _ask_8_tokens(client: openai.AsyncOpenAI, number: int) -> int:
    answer = await client.completions.create(
        model=MODEL, prompt=f"{number}: " + "river " * 200, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


def _descendants(pid: int) -> list[int]:
    """Processes that carry the mark of the replica whose actor is `pid`: those that its warden will end."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    marks = set()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        marks |= {variable.decode() for variable in variables if variable.startswith(b"HEADRACE_REPLICA=")}
    (mark,) = marks
    return warden.marked(mark)


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
