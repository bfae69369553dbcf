"""A fleet of one real replica from Python: the embedded model answers, as a whole and in pieces."""

import os
import secrets
import subprocess
import sys

import pytest

from headrace.fleet import warden

pytestmark = [pytest.mark.vllm, pytest.mark.long]

PROGRAM = """
import asyncio
from headrace import Fleet

CONFIG = {
    "models": [
        {
            "name": "smollm2",
            "source": "embedded",
            "pools": [
                {
                    "device": "cpu",
                    "engine": {
                        "max_model_len": 2048, "enforce_eager": True, "kv_cache_memory_bytes": 268435456,
                        "block_size": 32,
                    },
                }
            ],
        }
    ]
}
QUESTION = [
    {"role": "system", "content": "You know the capitals of all countries. " * 12},
    {"role": "user", "content": "What is the capital of France?"},
]

async def together(fleet):
    return await asyncio.gather(*(fleet.achat(QUESTION, max_tokens=8, temperature=0) for _ in range(4)))

with Fleet.from_config(CONFIG) as fleet:
    answer = fleet.chat(QUESTION, max_tokens=24, temperature=0)
    print("Paris" in answer.text, answer.finish_reason, answer.usage.prompt_tokens > 50)
    stream = fleet.stream_chat(QUESTION, max_tokens=24, temperature=0)
    pieces = list(stream)
    print(len(pieces) > 5, "Paris" in stream.answer.text, stream.answer.usage.cached_tokens > 50)
    print(len(asyncio.run(together(fleet))), len(fleet.complete("One, two, three,", max_tokens=4).text) > 0)
    print([replica.state.value for replica in fleet.status().replicas])
"""


def test_the_embedded_model_answers_a_python_program() -> None:
    name, value = "HEADRACE_TEST_RUN", secrets.token_hex(8)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("True ") and lines[0].endswith(" True"), lines
    assert lines[1:] == ["True True True", "4 True", "['ready']"], lines
    assert warden.marked(f"{name}={value}") == []
