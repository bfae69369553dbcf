"""The steps of an engine's start, from what vLLM's processes say."""

import os
from pathlib import Path

from headrace.backends.vllm_start_phases import StartLog, StepReader

SAID = """\
(MainProcess pid=31808) WARNING 11-25 17:55:38 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs
(EngineCore pid=31965) INFO 11-25 17:55:53 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: x
(Worker pid=32024) INFO 11-25 17:56:09 [cpu_model_runner.py:68] Starting to load model /m...
(Worker pid=32024) INFO 11-25 17:56:09 [base_loader.py:82] Initializing model took 0.208332 seconds
(Worker pid=32024) INFO 11-25 17:56:09 [default_loader.py:501] Loading weights took 0.20 seconds
(EngineCore pid=31965) INFO 11-25 17:56:10 [kv_cache_utils.py:2327] CPU KV cache size: 11,648 tokens
(EngineCore pid=31965) INFO 11-25 17:56:10 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.1 s
(EngineCore pid=31965) INFO 11-25 17:56:11 [kv_events.py:379] Starting ZMQ publisher thread
"""


def steps(text: str) -> list[str]:
    reader = StepReader()
    return [name for line in text.splitlines() if (name := reader.step(line)) is not None]


def test_each_step_is_named_when_its_line_comes() -> None:
    assert steps(SAID) == ["workers", "weights", "kv cache", "handshake"]


def test_a_second_worker_does_not_take_it_back() -> None:
    assert steps(SAID + SAID) == steps(SAID)


def test_other_lines_say_nothing() -> None:
    assert steps("INFO something else\n\n") == []


def test_lines_are_read_whole_as_they_come(tmp_path: Path) -> None:
    with open(tmp_path / "log", "a") as log:
        print("before", file=log, flush=True)
        reader = StartLog(log.fileno())
        assert list(reader.new_lines()) == []
        log.write("one\ntw")
        log.flush()
        assert list(reader.new_lines()) == ["one"]
        print("o", file=log, flush=True)
        assert list(reader.new_lines()) == ["two"]


def test_where_there_is_no_file_there_are_no_lines() -> None:
    reading, writing = os.pipe()
    assert list(StartLog(writing).new_lines()) == []
    os.close(reading)
    os.close(writing)
