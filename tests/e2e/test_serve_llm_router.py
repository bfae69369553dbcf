"""`DelayAwareRequestRouter` within a real Ray Serve LLM application: two vLLM replicas, each on a core of its own."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]
pytest.importorskip("ray.serve")
pytest.importorskip("pyarrow")  # what ray.serve.llm imports
openai = pytest.importorskip("openai")

from headrace_bench.serve_ground import llm_config, serve_ground  # noqa: E402

ROUTER = "headrace.serve.DelayAwareRequestRouter"
STORY = "The river rose in the hills, went past the old mill and carried barges to the sea. "
NUM_CONVERSATIONS = 6


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas need two cores")
    with serve_ground() as ground:
        from ray import serve
        from ray.serve.config import RequestRouterConfig
        from ray.serve.llm import build_openai_app

        config = llm_config(
            "smollm2",
            None,
            {
                "num_replicas": 2,
                "request_router_config": RequestRouterConfig(request_router_class=ROUTER),
            },
        )
        config.server_cls = _server()
        serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
        yield openai.OpenAI(base_url=ground.url("/v1"), api_key="none", max_retries=0, timeout=120.0)


def _server() -> Any:
    from headrace_bench.core_bound_server import CoreBoundServer

    return CoreBoundServer


def test_conversations_return_to_the_replica_that_holds_them(client: Any) -> None:
    first: list[list[dict[str, str]]] = []
    for number in range(NUM_CONVERSATIONS):
        said = [{"role": "user", "content": f"{number} tales. " + STORY * 20}]
        answer = client.chat.completions.create(model="smollm2", messages=said, max_tokens=4)
        assert answer.choices[0].message.content is not None
        first.append([*said, {"role": "assistant", "content": answer.choices[0].message.content}])
    for said in first:
        more = [*said, {"role": "user", "content": "And then?"}]
        answer = client.chat.completions.create(model="smollm2", messages=more, max_tokens=4)
        # By chance, all of them together would once in 64 times.
        assert answer.usage.prompt_tokens_details.cached_tokens > 200


def test_streams_and_mistakes_pass_through(client: Any) -> None:
    stream = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Say hi."}], max_tokens=5, stream=True
    )
    assert sum(bool(chunk.choices) for chunk in stream) >= 2
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "?"}])
