"""`headrace apply` and `headrace restart` beside a fleet that serves, as a user runs them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from ray_fleet import asking

Serving = Callable[..., AbstractContextManager[Any]]

LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"


def write(path: Path, replicas: int = 2, retries: int = 2, **simulated: Any) -> Path:
    model = {
        "name": "sim",
        "backend": "simulated",
        "pools": [{"replicas": replicas}],
        "simulated": {"step_s": 0.02, "start_s": 0.5, **simulated},
    }
    gateway = {"policy": "round_robin", "retries": retries, "access_log": False}
    path.write_text(yaml.safe_dump({"models": [model], "gateway": gateway}))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rollout") / "config.yaml")


@pytest.fixture(scope="module")
def fleet(serving: Serving, config: Path) -> Iterator[Any]:
    with serving(config, "--port", "0") as served:
        assert served.url
        yield served


def boots(fleet: Any) -> dict[str, str]:
    return {replica["id"]: replica["boot_id"] for replica in fleet.status()["replicas"]}


def run(fleet: Any, *words: str, timeout_s: float = 120) -> tuple[int, str]:
    """Exit code and output of another command."""
    process = fleet.beside(*words)
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise AssertionError(f"not done after {timeout_s:g} s; it said:\n{said}") from None
    return process.returncode, said


@asynccontextmanager
async def streams(url: str, model: str, count: int, tokens: int) -> AsyncIterator[list[int]]:
    """So many streams open all the while, each followed by another; yields how many pieces each had."""

    async def pieces(begun: asyncio.Event) -> int:
        counted = 0
        async for chunk in await client.completions.create(
            model=model,
            prompt="Rivers run",
            max_tokens=tokens,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ):
            begun.set()
            for choice in chunk.choices:
                counted += len(getattr(choice, "token_ids", None) or [None] * bool(choice.text))
        return counted

    async with (
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120) as client,
        asking(count, pieces) as had,
    ):
        yield had


@pytest.mark.ray
async def test_a_rolling_restart_shows_what_it_does_and_no_stream_breaks(fleet: Any) -> None:
    before = boots(fleet)
    async with streams(fleet.url, "sim", 50, 60) as had:
        code, said = await asyncio.to_thread(run, fleet, "restart", "--rolling")
    assert code == 0, said
    assert set(had) == {60}
    assert not set(before.values()) & set(boots(fleet).values())
    assert "restart: 2 of 2 replaced" in said
    assert any(f"{name}: draining" in said for name in before), said
    assert said.splitlines()[-1] == "restarted"


@pytest.mark.ray
def test_the_file_that_it_was_started_with_needs_nothing(fleet: Any, config: Path) -> None:
    assert run(fleet, "apply", str(config)) == (0, "nothing to do\n")


@pytest.mark.ray
def test_a_dry_run_says_what_would_be_done_and_does_nothing(fleet: Any, config: Path) -> None:
    before = boots(fleet)
    code, said = run(
        fleet, "apply", "--dry-run", str(write(config.parent / "other.yaml", 3, 5, num_blocks=9000))
    )
    assert code == 0
    assert said.splitlines() == [
        "live      gateway.retries: 2 -> 5",
        "replace   sim: models.sim.pools.unified.replicas: 2 -> 3",
        "replace   sim: models.sim.simulated.num_blocks: 4096 -> 9000",
    ]
    assert boots(fleet) == before


@pytest.mark.ray
def test_counts_and_gateway_settings_restart_nobody(fleet: Any, config: Path) -> None:
    before = boots(fleet)
    other = str(write(config.parent / "grown.yaml", 3, 5))
    code, said = run(fleet, "apply", other)
    assert (code, said.splitlines()[-1]) == (0, "applied"), said
    after = boots(fleet)
    assert before.items() < after.items()
    assert len(after) == 3
    assert run(fleet, "apply", other) == (0, "nothing to do\n")
    assert run(fleet, "apply", str(config))[0] == 0
    assert len(boots(fleet)) == 2


@pytest.mark.ray
def test_a_broken_configuration_stops_with_the_reason_and_the_old_one_rolls_it_back(
    fleet: Any, config: Path
) -> None:
    before = boots(fleet)
    broken = write(config.parent / "broken.yaml", start_error="the weights are broken")
    code, said = run(fleet, "apply", str(broken))
    assert code == 1
    assert "did not start: the weights are broken; the others serve on as before" in said
    assert set(before.items()) <= set(boots(fleet).items())
    assert run(fleet, "apply", str(config))[0] == 0
    assert boots(fleet) == before


@pytest.mark.ray
def test_a_command_that_is_left_leaves_the_work_to_the_fleet(fleet: Any) -> None:
    before = boots(fleet)
    process: subprocess.Popen[str] = fleet.beside("restart", "--rolling", "sim")
    assert process.stdout is not None
    for line in process.stdout:
        if "starting" in line:
            process.send_signal(signal.SIGINT)
            break
    said = process.stdout.read()
    assert process.wait(30) == 130, said
    assert "the fleet goes on with it" in said
    deadline_s = time.monotonic() + 60
    while fleet.status()["rollout"]["state"] == "rolling":
        assert time.monotonic() < deadline_s
    assert fleet.status()["rollout"]["replaced"] == 2
    assert not set(before.values()) & set(boots(fleet).values())


@pytest.mark.ray
def test_words_that_mean_nothing_say_what_to_do(fleet: Any) -> None:
    code, said = run(fleet, "restart", "sim")
    assert (code, "say --rolling" in said) == (1, True), said
    assert run(fleet, "restart")[0] == 2
    code, said = run(fleet, "restart", "--rolling", "nobody")
    assert (code, "no pool 'nobody'" in said) == (1, True), said
    assert "Traceback" not in said


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.timeout(600)
async def test_real_replicas_on_a_full_machine_are_replaced_under_open_streams(serving: Serving) -> None:
    """Both cores are taken, so that each drains before its successor starts."""
    with serving(LOCAL, "--port", "0") as served:
        url = await asyncio.to_thread(lambda: served.url)
        before = boots(served)
        began_s = time.monotonic()
        async with streams(url, "smollm2", 8, 64) as had:
            code, said = await asyncio.to_thread(run, served, "restart", "--rolling", timeout_s=300)
        print(f"{len(had)} streams, {time.monotonic() - began_s:.0f} s\n{said}")
        assert code == 0, said
        assert set(had) == {64}
        after = boots(served)
        assert len(after) == len(before)
        assert not set(before.values()) & set(after.values())
