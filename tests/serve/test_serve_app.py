"""The Serve application on a real Ray Serve, with simulated replicas."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

from headrace.errors import CallerError  # noqa: E402
from headrace.serve import build_app  # noqa: E402

from .conftest import CHAT, Ground, ask, config  # noqa: E402

NUM_INGRESSES = 2


def scaled(app: Any, num_replicas: int) -> Any:
    """As Serve's own configuration would say it."""
    return app._bound_deployment.options(num_replicas=num_replicas).bind(*app._bound_deployment.init_args)


@pytest.fixture(scope="module")
def app(ground: Ground) -> Iterator[Any]:
    """Two ingress replicas, two engines; its handle."""
    yield serve.run(scaled(build_app(config("shared")), NUM_INGRESSES), name="shared", route_prefix="/")
    serve.delete("shared")
    ground.until(lambda: not ground.actors("shared/"), "the fleet outlives its application")


def test_answers_a_chat_through_serves_proxy(ground: Ground, app: Any) -> None:
    answer = ground.post(ask())
    body = json.load(answer)
    assert body["object"] == "chat.completion" and body["model"] == "sim"
    assert len(answer.headers.get_all("x-request-id")) == 1


def test_streams_events_to_the_end(ground: Ground, app: Any) -> None:
    answer = ground.post(ask(stream=True, max_tokens=3))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["model"] == "sim" for event in events[:-1])


def test_errors_have_openais_form(ground: Ground, app: Any) -> None:
    status, body = ground.refusal(ask(model="nobody"))
    assert status == 404 and body["error"]["code"] == "model_not_found"
    status, body = ground.refusal({"model": "sim", "messages": "no list"})
    assert status == 400 and body["error"]["message"]
    status, body = ground.refusal({}, path="/nowhere")
    assert status == 404


def test_two_ingress_replicas_share_one_fleet(ground: Ground, app: Any) -> None:
    names = ground.actors("shared/")
    assert [name.rpartition("/")[0] for name in names] == [
        "shared",
        "shared",
        "shared/sim-unified-0",
        "shared/sim-unified-1",
    ]
    assert names[:2] == ["shared/controller", "shared/keeper"]
    status = serve.status().applications["shared"].deployments["HeadraceIngress"]
    assert status.replica_states == {"RUNNING": NUM_INGRESSES}


def test_a_killed_ingress_replica_takes_nothing_with_it(ground: Ground, app: Any) -> None:
    before = ground.actors("shared/")
    listed = ray.util.list_named_actors(all_namespaces=True)
    ingresses = [one for one in listed if "shared#HeadraceIngress" in one["name"]]
    ray.kill(ray.get_actor(ingresses[0]["name"], namespace=ingresses[0]["namespace"]), no_restart=True)
    for _ in range(5):
        assert app.chat.remote(ask()).result()["model"] == "sim"
    ground.until(
        lambda: (
            serve.status().applications["shared"].status == "RUNNING"
            and ingresses[0]["name"]
            not in {one["name"] for one in ray.util.list_named_actors(all_namespaces=True)}
        ),
        "the ingress replica was not replaced",
    )
    assert ground.actors("shared/") == before


def test_answers_by_handle(app: Any) -> None:
    answer = app.chat.remote(ask()).result()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    answer = app.complete.remote({"model": "sim", "prompt": "once", "max_tokens": 2}).result()
    assert answer["object"] == "text_completion"
    answer = app.post.remote(CHAT, ask()).result()
    assert answer["object"] == "chat.completion"


def test_streams_by_handle(app: Any) -> None:
    chunks = list(app.options(stream=True).chat_stream.remote(ask(max_tokens=3)))
    assert len(chunks) >= 2 and all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    chunks = list(
        app.options(stream=True).complete_stream.remote({"model": "sim", "prompt": "once", "max_tokens": 2})
    )
    assert all(chunk["object"] == "text_completion" for chunk in chunks) and chunks


def test_a_callers_mistake_is_raised_by_handle(app: Any) -> None:
    with pytest.raises(CallerError, match="`nobody` does not exist"):
        app.chat.remote(ask(model="nobody")).result()
    with pytest.raises(CallerError, match="_stream"):
        app.chat.remote(ask(stream=True)).result()
    with pytest.raises(CallerError, match="`nobody` does not exist"):
        list(app.options(stream=True).chat_stream.remote(ask(model="nobody")))


def test_composes_with_a_deployment_of_the_user(ground: Ground) -> None:
    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Shouter:
        def __init__(self, llm: Any) -> None:
            self.llm = llm

        async def __call__(self, request: Any) -> str:
            answer = await self.llm.chat.remote(await request.json())
            stream = self.llm.options(stream=True).chat_stream.remote(await request.json())
            pieces = [chunk["object"] async for chunk in stream]
            return f"{answer['choices'][0]['message']['content'].upper()} {set(pieces)}"

    serve.run(Shouter.bind(build_app(config("composed", 1))), name="composed", route_prefix="/composed")
    try:
        text = ground.post(ask(), prefix="/composed", path="/").read().decode()
        assert text == text.upper().replace("CHAT.COMPLETION.CHUNK", "chat.completion.chunk")
    finally:
        serve.delete("composed")
    ground.until(lambda: not ground.actors("composed/"), "the fleet outlives its application")


def test_deployed_twice_under_other_names_is_refused_with_the_reason(ground: Ground, app: Any) -> None:
    before = ground.actors("shared/")
    with pytest.raises(RuntimeError):
        serve.run(build_app(config("shared")), name="second", route_prefix="/second")
    told = serve.status().applications["second"].deployments["HeadraceIngress"].message
    assert "fleet 'shared' belongs to Serve application 'shared'; set another fleet.name" in told
    serve.delete("second")
    assert ground.chat()["model"] == "sim"
    assert ground.actors("shared/") == before


def test_deployed_again_with_the_same_engines_keeps_them(ground: Ground, app: Any) -> None:
    before = ground.actors("shared/")
    other = config("shared")
    other["gateway"]["policy"] = "round_robin"
    serve.run(scaled(build_app(other), NUM_INGRESSES), name="shared", route_prefix="/")
    assert ground.chat()["model"] == "sim"
    assert ground.actors("shared/") == before


def test_deployed_again_the_fleet_goes_over_to_it(ground: Ground) -> None:
    serve.run(build_app(config("renewed", 1)), name="renewed", route_prefix="/renewed")
    try:
        before = ground.actors("renewed/sim-")
        serve.run(build_app(config("renewed", 2)), name="renewed", route_prefix="/renewed")
        ground.until(lambda: len(ground.actors("renewed/sim-")) == 2, "the second replica does not come")
        assert set(before) < set(ground.actors("renewed/sim-")), "what did not change stays"

        serve.run(build_app(config("renewed", 2, block_size=32)), name="renewed", route_prefix="/renewed")
        ground.until(
            lambda: not set(before) & set(ground.actors("renewed/sim-")), "what is made otherwise stays"
        )
        assert ground.chat(prefix="/renewed")["model"] == "sim"
    finally:
        serve.delete("renewed")
    ground.until(lambda: not ground.actors("renewed/"), "the fleet outlives its application")


def test_a_deleted_application_leaves_no_process(ground: Ground) -> None:
    serve.run(build_app(config("ended", 2)), name="ended", route_prefix="/ended")
    status = ray.get(ground.actor("ended/controller").status.remote())
    pids = [replica.pid for replica in status.replicas]
    pids.append(ray.get(ground.actor("ended/controller").process_id.remote()))
    assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    serve.delete("ended")
    ground.until(lambda: not ground.actors("ended/"), "actors are left")
    ground.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "processes are left")


def test_what_cannot_start_is_told_and_leaves_nothing(ground: Ground) -> None:
    too_many = config("hungry")
    too_many["models"] = [
        {
            "name": "big",
            "source": "embedded",
            "pools": [{"replicas": 1, "device": "cuda", "tensor_parallel": 64}],
        }
    ]
    with pytest.raises(RuntimeError):
        serve.run(build_app(too_many), name="hungry", route_prefix="/hungry")
    told = serve.status().applications["hungry"].deployments["HeadraceIngress"].message
    assert "the replicas need 64 GPUs, the cluster has 0" in told
    serve.delete("hungry")
    ground.until(lambda: not ground.actors("hungry/"), "actors are left")
