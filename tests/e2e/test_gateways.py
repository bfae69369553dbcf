"""`headrace serve --gateways 2` and `headrace route --gateways 2`: one address, one end."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

Serving = Callable[..., AbstractContextManager[Any]]


def children(pid: int, name: str) -> list[int]:
    """Processes that `pid` has started and whose command line holds `name`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == pid and name.encode() in command:
            found.append(int(entry.name))
    return found


async def ask(url: str, count: int) -> int:
    """How many of `count` requests, each on a connection of its own, were answered."""

    async def one(number: int) -> bool:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=1) as client:
            answer = await client.chat.completions.create(
                model="sim", messages=[{"role": "user", "content": f"Question {number}"}], max_tokens=4
            )
        return bool(answer.choices[0].message.content)

    return sum(await asyncio.gather(*(one(number) for number in range(count))))


@pytest.mark.ray
async def test_serve_with_two_gateways_outlives_one_of_them_and_ends_with_both(
    tmp_path: Path, serving: Serving
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"models": [{"name": "sim", "backend": "simulated", "pools": [{"replicas": 2}]}]})
    )
    with serving(path, "--port", "0", "--gateways", "2") as served:
        url = await asyncio.to_thread(lambda: served.url)
        gateways = children(served.pid, "group_member")
        assert len(gateways) == 2
        assert await ask(url, 16) == 16
        os.kill(gateways[0], signal.SIGKILL)
        async with asyncio.timeout(60):
            while not set(children(served.pid, "group_member")) - set(gateways):
                await asyncio.sleep(0.05)
        assert await ask(url, 16) == 16
        assert await asyncio.to_thread(served.end, signal.SIGTERM) == 0
        assert served.left_behind() == []
        assert served.lines[-1] == "stopped"


def test_route_with_two_gateways_ends_them_at_ctrl_c() -> None:
    words = [
        "route",
        "--backend",
        "http://127.0.0.1:9",
        "--port",
        "0",
        "--gateways",
        "2",
        "--policy",
        "round_robin",
    ]
    route = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert route.stdout is not None
    assert route.stdout.readline().startswith("ready: http://127.0.0.1:")
    ends = [os.pidfd_open(pid) for pid in children(route.pid, "group_member")]
    assert len(ends) == 2
    os.killpg(route.pid, signal.SIGINT)
    route.communicate(timeout=30)
    assert route.returncode == 0
    for end in ends:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(end, 0)
        os.close(end)
