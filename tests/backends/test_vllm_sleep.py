"""Sleep mode made safe: what vLLM's engine is asked, and when its sleep is not believed. The engine is a stand-in."""

from __future__ import annotations

import pytest

from headrace.backends.vllm_arguments import EngineSettings, command_line
from headrace.backends.vllm_sleep import EngineSleep
from headrace.errors import SleepFailed

GIB = 2**30


class Engine:
    """Answers a probe with one token and writes down what it is asked; its device has 80 GiB."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.token = 7
        self.free = 10 * GIB
        self.frees = 60 * GIB

    def memory(self) -> tuple[int, int]:
        return self.free, 80 * GIB

    async def sleep(self, level: int) -> None:
        self.asked.append(f"sleep {level}")
        self.free += self.frees

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        self.asked.append(f"wake {tags}")
        return True

    async def collective_rpc(self, method: str) -> None:
        self.asked.append(method)

    async def probe(self) -> tuple[int, ...]:
        self.asked.append("probe")
        return (self.token,)


async def test_level_1_wakes_as_a_whole() -> None:
    engine = Engine()
    sleep = EngineSleep(engine, 1, engine.memory, engine.probe)
    assert await sleep.sleep() == 60 * GIB
    await sleep.wake()
    assert engine.asked == ["probe", "sleep 1", "wake None", "probe"]


async def test_level_2_reads_the_weights_again_before_the_cache_is_made() -> None:
    engine = Engine()
    sleep = EngineSleep(engine, 2, engine.memory, engine.probe)
    await sleep.sleep()
    await sleep.wake()
    assert engine.asked[2:] == ["wake ['weights']", "reload_weights", "wake ['kv_cache']", "probe"]


async def test_memory_that_stays_taken_is_noticed() -> None:
    engine = Engine()
    engine.frees = 20 * GIB
    with pytest.raises(SleepFailed, match=r"20\.0 GiB of the 70\.0 GiB"):
        await EngineSleep(engine, 1, engine.memory, engine.probe).sleep()


async def test_memory_that_cannot_be_measured_is_not_believed() -> None:
    engine = Engine()
    with pytest.raises(SleepFailed, match="cannot be measured"):
        await EngineSleep(engine, 1, lambda: None, engine.probe).sleep()
    assert engine.asked == []


async def test_another_answer_than_before_is_noticed() -> None:
    engine = Engine()
    sleep = EngineSleep(engine, 1, engine.memory, engine.probe)
    await sleep.sleep()
    engine.token = 8
    with pytest.raises(SleepFailed, match=r"token \[8\], not with \[7\]"):
        await sleep.wake()


def test_the_engine_is_told_at_its_start() -> None:
    assert "--enable-sleep-mode" in command_line(EngineSettings("m", "p", sleep_level=1))
    assert "--enable-sleep-mode" not in command_line(EngineSettings("m", "p"))
