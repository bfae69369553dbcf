"""Only the fleet's gateway comes in."""

import json
from typing import Any

import pytest

from headrace.backends.front_door import RELEASE_PATH, FrontDoor


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


async def ask(door: FrontDoor, *headers: tuple[bytes, bytes], kind: str = "http") -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": f"{kind}.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await door({"type": kind, "path": "/health", "headers": list(headers)}, receive, send)
    return sent


RIGHT = (b"authorization", b"Bearer secret")


@pytest.mark.parametrize(
    "headers", [(), ((b"authorization", b"Bearer wrong"),), ((b"authorization", b"secret"),)]
)
async def test_whoever_lacks_the_token_gets_an_openai_401(headers: Any) -> None:
    start, body = await ask(FrontDoor(inside, "secret"), *headers)
    assert start["status"] == 401
    assert json.loads(body["body"])["error"]["code"] == "invalid_api_key"


async def test_the_token_opens_the_door() -> None:
    start, _ = await ask(FrontDoor(inside, "secret"), RIGHT)
    assert start["status"] == 200


async def test_without_a_token_everybody_comes_in() -> None:
    start, _ = await ask(FrontDoor(inside, None))
    assert start["status"] == 200


async def test_a_closed_door_says_503_to_those_who_may_enter_and_401_to_others() -> None:
    door = FrontDoor(inside, "secret")
    door.close()
    assert (await ask(door, RIGHT))[0]["status"] == 503
    assert (await ask(door))[0]["status"] == 401


async def test_a_websocket_without_the_token_is_closed() -> None:
    assert await ask(FrontDoor(inside, "secret"), kind="websocket") == [
        {"type": "websocket.close", "code": 1008}
    ]


async def test_the_lifespan_of_the_app_passes_the_door() -> None:
    assert (await ask(FrontDoor(inside, "secret"), kind="lifespan"))[0]["status"] == 200


async def failing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"EngineDeadError"})


async def test_a_500_of_a_dead_engine_is_a_503_that_others_may_retry() -> None:
    start, body = await ask(FrontDoor(failing, "secret", is_broken=lambda: True), RIGHT)
    assert start["status"] == 503
    assert json.loads(body["body"])["error"]["code"] == "engine_dead"


async def test_a_500_of_a_living_engine_and_a_200_of_a_dead_one_stay_what_they_are() -> None:
    assert (await ask(FrontDoor(failing, "secret", is_broken=lambda: False), RIGHT))[0]["status"] == 500
    assert (await ask(FrontDoor(inside, "secret", is_broken=lambda: True), RIGHT))[0]["status"] == 200


async def released_by(door: FrontDoor, body: bytes, *headers: tuple[bytes, bytes]) -> int:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await door({"type": "http", "path": RELEASE_PATH, "headers": list(headers)}, receive, send)
    status: int = sent[0]["status"]
    return status


async def test_held_blocks_are_released_with_the_token_alone_and_by_a_closed_door_too() -> None:
    released: list[str] = []

    async def release_kv(request_ids: list[str]) -> None:
        released.extend(request_ids)

    door = FrontDoor(inside, "secret", release_kv=release_kv)
    assert await released_by(door, b'{"request_ids": ["a"]}') == 401
    assert await released_by(door, b"[]", RIGHT) == 400
    door.close()
    assert await released_by(door, b'{"request_ids": ["a", "b"]}', RIGHT) == 200
    assert released == ["a", "b"]
