"""A fleet that follows its load, as a user sees it: the commands, the lines, and no error on the way."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

Serving = Callable[..., AbstractContextManager[Any]]

SAY = [{"role": "user", "content": "Tell me a long story of a river and its mill."}]


def written(folder: Path, model: dict[str, Any], pool: dict[str, Any], **fleet: Any) -> Path:
    path = folder / "config.yaml"
    model = {**model, "pools": [pool]}
    path.write_text(yaml.safe_dump({"fleet": fleet, "models": [model], "gateway": {"policy": "delay"}}))
    return path


def client_of(served: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=240)


async def story(
    client: openai.AsyncOpenAI, model: str, tokens: int, begun: asyncio.Event | None = None
) -> int:
    """Stream an answer to its end; its tokens. Raises what the client raises."""
    counted = 0
    async for chunk in await client.chat.completions.create(
        model=model,
        messages=SAY,  # type: ignore[arg-type]
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        if begun is not None and chunk.choices:
            begun.set()
        if chunk.usage is not None:
            counted = chunk.usage.completion_tokens
    return counted


def lines_of(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


async def up_to(lines: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(lines)


@pytest.mark.ray
async def test_a_simulated_fleet_sleeps_wakes_grows_and_sleeps(serving: Serving, tmp_path: Path) -> None:
    scale = {"min_replicas": 0, "max_replicas": 3, "stabilisation_s": 1, "idle_s": 3, "target_waiting": 2}
    simulated = {"step_s": 0.02, "max_running": 2}
    config = written(
        tmp_path, {"name": "sim", "backend": "simulated", "simulated": simulated}, {"autoscale": scale}
    )
    with serving(config, "--port", "0") as served:
        assert served.url
        served.wait_line("no replica of sim runs yet; the first request starts one")
        (pool,) = served.status()["pools"]
        assert (pool["ready"], pool["target"], pool["least"], pool["most"]) == (0, 0, 0, 3)
        async with client_of(served) as client:
            assert [model.id async for model in client.models.list()] == ["sim"]
            assert await story(client, "sim", 20) == 20, "the first request waits for its replica"
            streams = [asyncio.create_task(story(client, "sim", 100)) for _ in range(60)]
            await up_to(lambda: served.wait_line("sim-unified-2: ready after"))
            assert await asyncio.gather(*streams) == [100] * 60
        for number in range(3):  # in whatever order
            await up_to(lambda number=number: served.wait_line(f"sim-unified-{number}: gone"))
        told = json.loads(served.command("scale", "--why", "sim", "--json"))
        assert (told["changes"][0]["current"], told["changes"][0]["target"]) == (0, 1)
        assert "held where no replica runs" in told["changes"][0]["reason"]
        assert "-> 0" in served.command("scale", "--why")
        assert lines_of(told["log"]) == told["changes"]
        served.command("scale", "sim", "2")
        await up_to(lambda: served.wait_line("sim-unified-1: ready after", after=len(served.lines)))
        assert "2 (pinned)" in served.command("status")
        served.command("scale", "sim", "--auto")


VLLM = {
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 * 1024**2,
    "enforce_eager": True,
}


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.timeout(600)
async def test_real_replicas_come_with_the_load_and_go_with_it(serving: Serving, tmp_path: Path) -> None:
    """From none: the first request is answered by the first replica; a burst brings a second one, which serves the
    next burst beside the first; then both go. No request fails on the way."""
    scale = {
        "min_replicas": 0, "max_replicas": 2, "stabilisation_s": 5, "idle_s": 10, "target_waiting": 4
    }  # fmt: skip
    pool = {"device": "cpu", "engine": VLLM, "autoscale": scale}
    config = written(tmp_path, {"name": "smollm2"}, pool)
    figures: dict[str, float] = {}

    def note(what: str) -> None:
        figures[what] = time.monotonic() - began_s

    with serving(config, "--port", "0") as served:
        assert served.url
        async with client_of(served) as client:
            began_s = time.monotonic()
            assert await story(client, "smollm2", 8) == 8
            note("from zero to the end of the first answer")
            began_s = time.monotonic()
            burst = [asyncio.create_task(story(client, "smollm2", 100)) for _ in range(24)]
            await up_to(lambda: served.wait_line("smollm2: 1 -> 2 replicas"))
            note("from the burst to the decision")
            assert await asyncio.gather(*burst) == [100] * 24
            note("from the burst to its last answer")
            kept = asyncio.create_task(keep_asking(client, "smollm2"))
            # A start beside a replica that computes shares two cores with it.
            await up_to(lambda: served.wait_line("smollm2-unified-1: ready after", timeout_s=240))
            note("from the burst to the second replica")
            said = len(served.lines)
            more = [asyncio.create_task(story(client, "smollm2", 60)) for _ in range(16)]
            assert await asyncio.gather(*more) == [60] * 16
            kept.cancel()
            await asyncio.gather(kept, return_exceptions=True)
            answers = served.lines[said:]
            for number in range(2):
                assert any(f'"replica":"smollm2-unified-{number}"' in line for line in answers), number
            began_s = time.monotonic()
        await up_to(lambda: served.wait_line(r"smollm2: \d -> 0 replicas", after=said))
        note("from the last answer to none wanted")
        await up_to(lambda: served.wait_line("smollm2-unified-0: gone", after=said))
        print(served.command("scale", "--why"))
    print("\n".join(f"{name}: {value:.1f} s" for name, value in figures.items()))


async def keep_asking(client: openai.AsyncOpenAI, model: str) -> None:
    """One short request after the other, so that nobody goes to sleep."""
    while True:
        assert await story(client, model, 8) == 8
        await asyncio.sleep(2)


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.timeout(400)
async def test_streams_of_real_replicas_outlive_a_scale_down(serving: Serving, tmp_path: Path) -> None:
    config = written(tmp_path, {"name": "smollm2"}, {"replicas": 2, "device": "cpu", "engine": VLLM})
    with serving(config, "--port", "0") as served:
        assert served.url
        async with client_of(served) as client:
            begun = [asyncio.Event() for _ in range(16)]
            streams = [asyncio.create_task(story(client, "smollm2", 200, one)) for one in begun]
            await asyncio.gather(*(one.wait() for one in begun))
            served.command("scale", "smollm2", "1")
            assert await asyncio.gather(*streams) == [200] * 16
            await up_to(lambda: served.wait_line(r"smollm2-unified-\d: gone"))
            assert await story(client, "smollm2", 8) == 8
        assert len(served.status()["replicas"]) == 1
