"""The external backend: says in one line why a server cannot be used, and reads vLLM's metrics."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from headrace.backends.asgi_server import AsgiServer
from headrace.backends.external import ExternalBackend
from headrace.backends.front_door import Receive, Scope, Send
from headrace.errors import ReplicaUnhealthy, StartError

MODELS = b'{"object": "list", "data": [{"id": "m", "max_model_len": 77}]}'
METRICS = b"""# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 1e-01
vllm:num_requests_running_of_another 9
"""


class Answers:
    """A server that answers fixed bodies; other paths are 404."""

    def __init__(self, **bodies: bytes) -> None:
        self.bodies = {"/" + name.replace("_", "/"): body for name, body in bodies.items()}

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        body = self.bodies.get(scope["path"])
        length = [(b"content-length", str(len(body or b"")).encode())]
        await send({"type": "http.response.start", "status": 404 if body is None else 200, "headers": length})
        await send({"type": "http.response.body", "body": body or b""})


@pytest.fixture
async def plain() -> AsyncIterator[tuple[str, Answers]]:
    """A server that knows nothing but its models."""
    answers = Answers(v1_models=MODELS)
    server = AsgiServer(answers, "127.0.0.1")
    yield await server.start(), answers
    await server.stop()


def ignore(_phase: str) -> None: ...


async def test_a_server_without_health_or_metrics_will_do(plain: tuple[str, Answers]) -> None:
    backend = ExternalBackend(plain[0] + "/", "m")
    started = await backend.start(ignore)
    assert (started.endpoints.url, started.max_model_len) == (plain[0], 77)
    await backend.check()
    assert backend.load() is None
    plain[1].bodies.clear()
    with pytest.raises(ReplicaUnhealthy, match="HTTP 404"):
        await backend.check()
    await backend.stop()


async def test_gauges_of_several_engines_are_joined(plain: tuple[str, Answers]) -> None:
    plain[1].bodies["/metrics"] = METRICS
    backend = ExternalBackend(plain[0], "m")
    await backend.start(ignore)
    load = backend.load()
    await backend.stop()
    assert load is not None
    assert (load.running, load.waiting, load.kv_use) == (5, 7, pytest.approx(0.3))


async def test_a_wrong_model_name_is_told_with_what_is_served(plain: tuple[str, Answers]) -> None:
    with pytest.raises(StartError, match="serves 'm', not 'n'"):
        await ExternalBackend(plain[0], "n").start(ignore)


async def test_a_server_of_another_kind_is_told(plain: tuple[str, Answers]) -> None:
    plain[1].bodies["/v1/models"] = b"<html>"
    with pytest.raises(StartError, match="not an OpenAI model list"):
        await ExternalBackend(plain[0], "m").start(ignore)


async def test_a_server_that_does_not_answer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    backend = ExternalBackend(f"http://127.0.0.1:{port}", "m", start_timeout_s=0.3)
    with pytest.raises(StartError, match=f"127.0.0.1:{port} did not answer within 0.3 s"):
        await backend.start(ignore)
    with pytest.raises(ReplicaUnhealthy, match=str(port)):
        await backend.check()


async def test_an_impossible_url_is_a_start_error() -> None:
    with pytest.raises(StartError, match="check the URL"):
        await ExternalBackend("ftp//nowhere", "m", start_timeout_s=0.1).start(ignore)


def test_it_brings_neither_ray_nor_vllm_nor_torch() -> None:
    code = "import sys, headrace.backends.external; print({'ray', 'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"
