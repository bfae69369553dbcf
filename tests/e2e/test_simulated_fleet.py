"""Sixteen simulated replicas behind one gateway, as `headrace serve` brings them up."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

pytestmark = pytest.mark.ray

Serving = Callable[..., AbstractContextManager[Any]]
Ends = Callable[[int], Callable[[], bool]]

NUM_REPLICAS = 16
CONFIG = {
    "models": [
        {
            "name": "sim",
            "backend": "simulated",
            "pools": [{"replicas": NUM_REPLICAS}],
            "simulated": {"step_s": 0.01},
        }
    ],
    "gateway": {"policy": "round_robin"},
}


@pytest.fixture(scope="module")
def fleet(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path: Path = tmp_path_factory.mktemp("fleet") / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with serving(path, "--port", "0") as served:
        assert served.url
        yield served


async def ask(client: openai.AsyncOpenAI, number: int, max_tokens: int = 16) -> str:
    answer = await client.chat.completions.create(
        model="sim", messages=[{"role": "user", "content": f"Question {number}"}], max_tokens=max_tokens
    )
    return answer.choices[0].message.content or ""


async def test_all_of_them_answer_at_once(fleet: Any) -> None:
    async with openai.AsyncOpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(ask(client, number) for number in range(4 * NUM_REPLICAS)))
    assert all(answers)
    status = fleet.status()
    assert [replica["state"] for replica in status["replicas"]] == ["ready"] * NUM_REPLICAS
    assert status["url"] == fleet.url


async def test_a_replica_killed_under_load_costs_no_client_an_error_and_comes_back(
    fleet: Any, ends: Ends
) -> None:
    victim = fleet.status()["replicas"][3]
    said = len(fleet.lines)
    gone = ends(victim["pid"])
    async with openai.AsyncOpenAI(base_url=fleet.url + "/v1", api_key="none", max_retries=0) as client:
        asking = [asyncio.create_task(ask(client, number, max_tokens=64)) for number in range(64)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        more = [asyncio.create_task(ask(client, number, max_tokens=64)) for number in range(64, 128)]
        os.kill(victim["pid"], signal.SIGKILL)
        answers = await asyncio.gather(*asking, *more)
    assert all(answers)
    assert gone()
    await asyncio.to_thread(fleet.wait_line, rf"{victim['id']}: its process died", 60, said)
    await asyncio.to_thread(fleet.wait_line, rf"{victim['id']}: ready after", 60, said)
    again = fleet.status()["replicas"][3]
    assert again["boot_id"] != victim["boot_id"]
    assert again["restarts"] == 1


def test_a_second_fleet_of_the_same_name_is_chosen_by_its_pid(fleet: Any) -> None:
    assert fleet.status("--pid", str(fleet.pid))["url"] == fleet.url
    assert fleet.status("--url", fleet.url)["state"] == "ready"


def test_sixteen_replicas_do_not_fill_the_screen(fleet: Any) -> None:
    ready = next(number for number, line in enumerate(fleet.lines) if line.startswith("ready: "))
    assert any(" more: " in line for line in fleet.lines[:ready])


def test_sigterm_ends_all_of_it_with_exit_code_0(fleet: Any) -> None:
    assert fleet.left_behind()
    assert fleet.end(signal.SIGTERM) == 0
    assert fleet.left_behind() == []
    assert fleet.lines[-1] == "stopped"
    assert not any("Traceback" in line for line in fleet.lines), "\n".join(fleet.lines)


def test_a_run_without_failures_leaves_no_folder_of_ray(tmp_path: Path, serving: Serving) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "sim", "backend": "simulated"}]}))
    with serving(path, "--port", "0") as served:
        assert served.url
        sessions = list(Path("/tmp/ray").glob(f"session_*_{served.pid}"))
        assert len(sessions) == 1
        assert served.end(signal.SIGTERM) == 0
        assert not sessions[0].exists()
        assert not any(line.startswith("logs: ") for line in served.lines)


async def test_sigterm_lets_a_request_finish_that_takes_longer_than_rays_own_patience(
    tmp_path: Path, serving: Serving
) -> None:
    # Ray's handler of SIGTERM would abort the process after 3 s.
    path = tmp_path / "config.yaml"
    model = {"name": "sim", "backend": "simulated", "simulated": {"step_s": 0.1}}
    path.write_text(yaml.safe_dump({"models": [model]}))
    with serving(path, "--port", "0") as served:
        url = await asyncio.to_thread(lambda: served.url)
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model="sim", prompt="x", max_tokens=50, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(stream))
            ending = asyncio.create_task(asyncio.to_thread(served.end, signal.SIGTERM))
            chunks = [chunk async for chunk in stream if chunk.choices and chunk.choices[0].text]
        assert len(chunks) >= 48
        assert await ending == 0
