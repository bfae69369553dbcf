"""`serve run` as a user starts it, with a real replica, asked by openai's client."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.fleet import warden

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(400)]
pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")

CONFIG = Path(__file__).parents[2] / "configs" / "serve.yaml"
START_S = 240.0


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """The committed configuration on a free port; afterwards no process is left."""
    tree = yaml.safe_load(CONFIG.read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = tree["http_options"]["port"] = probe.getsockname()[1]
    name, value = "HEADRACE_TEST_RUN", secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "serve.yaml", Path(folder) / "log"
        file.write_text(yaml.safe_dump(tree))
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(file)],
            env={**os.environ, name: value, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            found = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60.0
            )
            deadline_s = time.monotonic() + START_S
            while not _answers(found):
                assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-3000:]
                time.sleep(0.5)
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                warden.end_all(f"{name}={value}", 15.0)
    assert warden.marked(f"{name}={value}") == []


def _answers(client: Any) -> bool:
    try:
        return bool(client.models.list().data)
    except openai.OpenAIError:
        return False


def test_answers_a_question(client: Any) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=20,
    )
    assert "Paris" in answer.choices[0].message.content


def test_streams(client: Any) -> None:
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "Paris" in "".join(pieces) and len(pieces) > 3


def test_an_unknown_model_is_openais_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "?"}])
