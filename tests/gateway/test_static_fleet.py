"""What `headrace route` finds out about servers that somebody else runs."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from headrace.errors import ConfigError
from headrace.gateway.static_fleet import StaticFleet
from headrace_router.types import ReplicaState

METRICS = (
    b"process_start_time_seconds %d.5\n"
    b'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="500",user="a b"} 1.0\n'
)
SOURCES = {
    "0": {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5557",
        "replay_endpoint": None,
    }
}


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers what a test puts into `pages`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = self.server.pages.get(self.path)  # type: ignore[attr-defined]
        self.send_response(404 if page is None else 200)
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, args=(0.01,))
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


async def test_plain_server_is_known_by_its_models(server: FakeServer) -> None:
    server.pages["/v1/models"] = json.dumps(
        {"data": [{"id": "one"}, {"id": "two", "max_model_len": 99}]}
    ).encode()
    one, two = (await StaticFleet([server.url], interval_s=0).watch(None)).replicas
    assert (one.model, two.model, two.max_model_len) == ("one", "two", 99)
    assert one.id != two.id
    assert one.endpoints.kv_events is None


async def test_vllm_server_tells_of_its_cache(server: FakeServer) -> None:
    server.pages |= {
        "/v1/models": b'{"data":[{"id":"m"}]}',
        "/metrics": METRICS % 7,
        "/kv_event_sources": json.dumps(SOURCES).encode(),
    }
    (replica,) = (await StaticFleet([server.url], interval_s=0).watch(None)).replicas
    assert (replica.block_size, replica.num_blocks) == (32, 500)
    assert replica.endpoints.kv_events == "tcp://127.0.0.1:5557"


async def test_restart_between_two_looks_is_another_boot(server: FakeServer) -> None:
    server.pages |= {"/v1/models": b'{"data":[{"id":"m"}]}', "/metrics": METRICS % 7}
    fleet = StaticFleet([server.url], interval_s=0)
    first = await fleet.watch(None)
    assert await fleet.watch(first) is first
    server.pages["/metrics"] = METRICS % 8
    second = await fleet.watch(first)
    assert second.replicas[0].boot_id != first.replicas[0].boot_id


async def test_server_without_models_is_named_by_the_user_or_complained_about(server: FakeServer) -> None:
    fleet = StaticFleet([server.url], interval_s=0)
    assert (await fleet.watch(None)).replicas == ()
    assert fleet.problems == [
        f"{server.url} answers but has no /v1/models; name what it serves with --model NAME"
    ]
    (replica,) = (await StaticFleet([server.url], model="mine", interval_s=0).watch(None)).replicas
    assert replica.model == "mine"


async def test_dead_server_stays_known_but_takes_nothing(server: FakeServer) -> None:
    server.pages["/v1/models"] = b'{"data":[{"id":"m"}]}'
    fleet = StaticFleet([server.url], interval_s=0)
    known = await fleet.watch(None)
    server.shutdown()
    server.server_close()
    assert await fleet.watch(known) is known  # one miss is forgiven
    gone = await fleet.watch(known)
    assert [replica.state for replica in gone.replicas] == [ReplicaState.FAILED]
    assert "does not answer" in fleet.problems[0]


@pytest.mark.parametrize(
    "url",
    ["foo", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://a:0", "http://a/v1", "http://a?x"],
)
def test_what_cannot_be_a_backend_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="not a backend URL"):
        StaticFleet([url])
