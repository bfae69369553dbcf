"""A fleet as a Python object.

    with Fleet.from_config("configs/local.yaml") as fleet:      # or start() and close(), in cells of a notebook
        fleet.chat("Hello").text
        for text in fleet.stream_chat("Tell me of rivers"): ...

    async with Fleet.from_config(...) as fleet:
        (await fleet.achat("Hello")).text
        async for text in fleet.astream_chat("Tell me of rivers"): ...

Every request takes the way of every other client's: HTTP to the fleet's gateway, which is in this process, on a thread
of its own. `url` is for other clients (`openai.OpenAI(base_url=fleet.url + "/v1", api_key="none")`).
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from headrace import config as configuration
from headrace.api.answer import Answer, read_answer
from headrace.api.client import Client
from headrace.api.loop_thread import LoopThread
from headrace.api.running import OwnFleet, Running, RunningElsewhere
from headrace.api.streams import AsyncTextStream, TextStream
from headrace.config import Config
from headrace.errors import BadRequest, CallerError, HeadraceError, ShortageError, StartError, UpstreamFailed
from headrace.fleet import run_file
from headrace.fleet.controller_call import TIMEOUT_S, pick
from headrace.fleet.status import FleetStatus, PoolStatus

Messages = str | Sequence[Mapping[str, Any]]
"""A user's words, or OpenAI's list of messages."""

Prompt = str | Sequence[int]
"""Text, or token ids."""

_CHAT = "/v1/chat/completions"
_COMPLETE = "/v1/completions"


class Fleet:
    """Open it (`with`, `async with`, `start`), then call it from any thread or event loop.

    Errors are `headrace.errors`: `CallerError` where the same call cannot succeed, `ShortageError` where it may later.
    A fleet that this process has brought up and nobody closed ends with the interpreter.
    """

    def __init__(self, running: Running, drain_s: float) -> None:
        """For the class methods below."""
        self._running = running
        self._drain_s = drain_s
        self._thread: LoopThread | None = None
        self._client: Client | None = None
        self._model: str | None = None
        self._is_closed = False

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike[str] | Mapping[str, Any] | Config,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        address: str | None = None,
    ) -> Fleet:
        """A fleet of this process, by a YAML file, a mapping as YAML would give it, or a `Config`.

        Its gateway listens at `host` and a free port, not where the configuration says: that is for `headrace serve`.
        `address`: a Ray cluster to join; by default the one that this process is connected to, else one of its own.
        Raises ConfigError. Nothing starts before the fleet is opened.
        """
        if isinstance(config, Mapping):
            config = configuration.parse(config)
        elif not isinstance(config, Config):
            config = configuration.load(Path(config))
        given = {"host": host, "port": port, "access_log": False}
        gateway = configuration.node(
            configuration.Gateway, {**config.gateway.model_dump(), **given}, at="gateway"
        )
        config = config.model_copy(update={"gateway": gateway})
        return cls(OwnFleet(config, address), config.fleet.drain_timeout_s)

    @classmethod
    def connect(cls, name: str | None = None, *, url: str | None = None) -> Fleet:
        """A fleet that runs already: the one of this user on this machine, by its `fleet.name` where there are several,
        or whichever gateway answers at `url`. Closing it leaves it running.

        Raises StartError when there is none, or more than one.
        """
        if url is not None:
            return cls(RunningElsewhere(url.rstrip("/").removesuffix("/v1"), None), 0.0)
        run = pick(run_file.running(), name, None, None)
        if not run.is_ready:
            raise StartError(f"fleet {run.fleet!r} (pid {run.pid}) is still starting")
        return cls(RunningElsewhere(run.url, run), 0.0)

    # --- life

    @property
    def url(self) -> str:
        """Of the gateway, without /v1. Raises CallerError before the fleet is open."""
        self._opened()
        return self._running.url

    def start(self) -> Fleet:
        """Open: return when every replica is ready. Raises StartError; then, and after Ctrl-C, nothing is left."""
        thread = self._begin()
        try:
            opening = thread.submit(self._open())
            try:
                opening.result()
            except BaseException:
                opening.cancel()
                raise
        except BaseException:
            self._end(thread, 0.0)
            raise
        self._has_opened()
        return self

    async def astart(self) -> Fleet:
        """`start` for an event loop."""
        thread = self._begin()
        try:
            await thread.join(self._open())
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._end, thread, 0.0))
            raise
        self._has_opened()
        return self

    def close(self, drain_s: float | None = None) -> None:
        """End what was opened: requests may finish for at most `drain_s` (default: fleet.drain_timeout_s), Ctrl-C cuts
        them. Safe twice. Of a fleet that runs elsewhere only the connection ends."""
        thread = self._thread
        if thread is not None:
            self._end(thread, self._drain_s if drain_s is None else drain_s)

    async def aclose(self, drain_s: float | None = None) -> None:
        """`close` for an event loop."""
        await asyncio.shield(asyncio.to_thread(self.close, drain_s))

    def __enter__(self) -> Fleet:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else 0.0)

    async def __aenter__(self) -> Fleet:
        return await self.astart()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(None if kind is None else 0.0)

    def _begin(self) -> LoopThread:
        if self._thread is not None or self._is_closed:
            raise CallerError("this Fleet has been opened before; make a new one")
        _open_fleets.add(self)  # kept, so that one that is forgotten is ended in order
        self._thread = LoopThread("headrace-fleet")
        return self._thread

    async def _open(self) -> None:
        await self._running.open()
        self._client = Client(asyncio.get_running_loop(), self._running.url)

    def _has_opened(self) -> None:
        # Ray has registered its own end by now; ours comes before it.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        if threading.current_thread() is threading.main_thread():
            # Ray's C++ half has put a handler of SIGTERM before Python's that prints a stack.
            handler = signal.getsignal(signal.SIGTERM)
            if handler is not None:
                signal.signal(signal.SIGTERM, handler)

    def _end(self, thread: LoopThread, drain_s: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            thread.run_to_the_end(self._close(drain_s), self._running.hurry)
        finally:
            thread.close()
            _open_fleets.discard(self)

    async def _close(self, drain_s: float) -> None:
        await self._running.close(drain_s)
        if self._client is not None:
            self._client.close()

    def _opened(self) -> tuple[LoopThread, Client]:
        if self._thread is None or self._client is None or self._is_closed:
            state = "closed" if self._is_closed else "not open; use it in a `with`, or call start()"
            raise CallerError(f"this Fleet is {state}")
        return self._thread, self._client

    # --- requests

    def chat(self, messages: Messages, *, model: str | None = None, **parameters: Any) -> Answer:
        """Ask the model. `model` may be left out where one is served; `parameters` are those of OpenAI's
        chat completions and vLLM's additions to them (`max_tokens`, `temperature`, `tools`, `top_k`, ...)."""
        thread, _ = self._opened()
        return thread.run(self._ask(_CHAT, _chat_body(messages, parameters), model))

    def complete(self, prompt: Prompt, *, model: str | None = None, **parameters: Any) -> Answer:
        """Continue a text, or token ids. Otherwise as `chat`, by OpenAI's completions."""
        thread, _ = self._opened()
        return thread.run(self._ask(_COMPLETE, {**parameters, "prompt": prompt}, model))

    def stream_chat(self, messages: Messages, *, model: str | None = None, **parameters: Any) -> TextStream:
        """As `chat`, piece by piece."""
        thread, _ = self._opened()
        return TextStream(thread, self._stream(_CHAT, _chat_body(messages, parameters), model))

    def stream_complete(self, prompt: Prompt, *, model: str | None = None, **parameters: Any) -> TextStream:
        """As `complete`, piece by piece."""
        thread, _ = self._opened()
        return TextStream(thread, self._stream(_COMPLETE, {**parameters, "prompt": prompt}, model))

    async def achat(self, messages: Messages, *, model: str | None = None, **parameters: Any) -> Answer:
        """`chat` for an event loop. Cancelled, the replica stops working on it."""
        thread, _ = self._opened()
        return await thread.join(self._ask(_CHAT, _chat_body(messages, parameters), model))

    async def acomplete(self, prompt: Prompt, *, model: str | None = None, **parameters: Any) -> Answer:
        """`complete` for an event loop."""
        thread, _ = self._opened()
        return await thread.join(self._ask(_COMPLETE, {**parameters, "prompt": prompt}, model))

    def astream_chat(
        self, messages: Messages, *, model: str | None = None, **parameters: Any
    ) -> AsyncTextStream:
        """`stream_chat` for an event loop."""
        thread, _ = self._opened()
        return AsyncTextStream(thread, self._stream(_CHAT, _chat_body(messages, parameters), model))

    def astream_complete(
        self, prompt: Prompt, *, model: str | None = None, **parameters: Any
    ) -> AsyncTextStream:
        """`stream_complete` for an event loop."""
        thread, _ = self._opened()
        return AsyncTextStream(thread, self._stream(_COMPLETE, {**parameters, "prompt": prompt}, model))

    async def _ask(self, path: str, body: dict[str, Any], model: str | None) -> Answer:
        _, client = self._opened()
        if body.get("stream"):
            raise BadRequest("`stream` is what stream_chat and stream_complete are for", param="stream")
        answer = await client.post(path, {**body, "model": model or await self._only_model()})
        try:
            return read_answer(answer)
        except ValueError as error:
            raise UpstreamFailed(str(error)) from None

    async def _stream(self, path: str, body: dict[str, Any], model: str | None) -> AsyncIterator[Any]:
        _, client = self._opened()
        body = {"stream_options": {"include_usage": True}, **body, "stream": True}
        chunks = client.stream(path, {**body, "model": model or await self._only_model()})
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]  # it is a generator

    async def _only_model(self) -> str:
        """Of a fleet that serves one. Raises BadRequest where there are several."""
        if self._model is None:
            names = await self._model_names()
            if len(names) != 1:
                raise BadRequest(
                    f"say which model: this fleet serves {', '.join(names) or 'none'}", param="model"
                )
            self._model = names[0]
        return self._model

    async def _model_names(self) -> list[str]:
        _, client = self._opened()
        return [str(card["id"]) for card in (await client.get("/v1/models"))["data"]]

    def models(self) -> list[str]:
        """The models that are served now."""
        thread, _ = self._opened()
        return thread.run(self._model_names())

    # --- the fleet itself

    def status(self) -> FleetStatus:
        """Every replica: its state, load, place and past. Raises CallerError for a fleet of which only the URL is
        known."""
        thread, _ = self._opened()
        return thread.run(self._status())

    async def astatus(self) -> FleetStatus:
        """`status` for an event loop."""
        thread, _ = self._opened()
        return await thread.join(self._status())

    def scale(self, pool: str, count: int | None) -> PoolStatus:
        """Give a pool (`model`, or `model/role`) `count` replicas, whatever its load; None leaves that to its
        configuration again. Returns at once: replicas start and drain meanwhile, `status` shows them.

        Raises NotFound for a pool that there is not, BadRequest for a number that cannot be.
        """
        thread, _ = self._opened()
        return thread.run(self._scale(pool, count))

    async def ascale(self, pool: str, count: int | None) -> PoolStatus:
        """`scale` for an event loop."""
        thread, _ = self._opened()
        return await thread.join(self._scale(pool, count))

    async def _status(self) -> FleetStatus:
        status: FleetStatus = await self._call(lambda controller: controller.status.remote())
        return status

    async def _scale(self, pool: str, count: int | None) -> PoolStatus:
        row: PoolStatus = await self._call(lambda controller: controller.scale.remote(pool, count))
        return row

    async def _call(self, call: Callable[[Any], Any]) -> Any:
        """What the controller answers. Raises its errors as they were there."""
        controller = await self._running.controller()
        import ray

        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await call(controller)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HeadraceError):
                raise error.cause from None
            raise
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ShortageError(f"the controller does not answer: {type(error).__name__}") from error


_open_fleets: set[Fleet] = set()


def _close_all() -> None:
    for fleet in list(_open_fleets):
        fleet.close(0.0)


def _chat_body(messages: Messages, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {**parameters, "messages": list(messages)}
