"""One local Ray cluster with Serve on a free port, for all tests of this folder."""

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

import pytest

from headrace.fleet import cluster, warden
from headrace.fleet.replica_host import NAMESPACE

PATIENCE_S = 60.0
CHAT = "/v1/chat/completions"


@dataclass
class Ground:
    """A cluster on which Serve listens."""

    port: int

    def post(self, body: dict[str, Any], *, prefix: str = "", path: str = CHAT) -> HTTPResponse:
        """Raises urllib's HTTPError for 4xx and 5xx."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{prefix}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE_S)
        return answer

    def chat(self, *, prefix: str = "", **fields: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.load(self.post(ask(**fields), prefix=prefix))
        return answer

    def refusal(self, body: dict[str, Any], **where: str) -> tuple[int, dict[str, Any]]:
        """Status and error body."""
        try:
            answer = self.post(body, **where)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        raise AssertionError(f"{answer.status}, an answer")

    @staticmethod
    def actors(part: str = "") -> list[str]:
        """Names of our own actors that live."""
        import ray

        named = ray.util.list_named_actors(all_namespaces=True)
        return sorted(
            one["name"] for one in named if one["namespace"] == NAMESPACE and one["name"].startswith(part)
        )

    @staticmethod
    def actor(name: str) -> Any:
        import ray

        return ray.get_actor(name, namespace=NAMESPACE)

    @staticmethod
    def until(holds: Callable[[], bool], what: str) -> None:
        """Wait for what no event tells of: Ray lists actors, it does not report their ends."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline_s, what
            time.sleep(0.1)


def ask(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}


def config(fleet: str, replicas: int = 2, **engine: Any) -> dict[str, Any]:
    return {
        "fleet": {"name": fleet, "drain_timeout_s": 5.0},
        "models": [
            {
                "name": "sim",
                "backend": "simulated",
                "pools": [{"replicas": replicas}],
                "simulated": {"step_s": 0.001, **engine},
            }
        ],
        "gateway": {"access_log": False},
    }


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    pytest.importorskip("ray.serve")
    stdout = sys.stdout
    connection = cluster.start_local()
    sys.stdout.close()
    sys.stdout = stdout
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield Ground(port)
        serve.shutdown()
    finally:
        cluster.leave(connection)
        assert warden.marked(connection.mark) == []
