"""The HTTP face of a simulated engine, in raw ASGI: OpenAI's chat and completions, vLLM's side endpoints.

A client that leaves aborts its request in the engine at once, as with vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from headrace.backends.front_door import Receive, Scope, Send
from headrace.backends.simulated_answer import Answer, send_body, send_json
from headrace.backends.simulated_forms import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenId,
    TokenizeBody,
    error,
)
from headrace.backends.simulated_loop import SimulatedLoop
from headrace.backends.simulated_tokens import decode, encode, encode_chat
from headrace.errors import BadRequest, CallerError, HeadraceError, MethodNotAllowed, ModelNotFound, NotFound

Form = TypeVar("Form")
Handler = Callable[[Receive, Send], Awaitable[None]]

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


class ClientLeft(Exception):
    """The client closed its connection; nobody is there to answer."""


class SimulatedApi:
    """The ASGI application."""

    def __init__(self, loop: SimulatedLoop, model: str) -> None:
        self._loop = loop
        self._model = model
        self._created = int(time.time())
        self._answering = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
            "/reset_prefix_cache": ("POST", self._reset_prefix_cache),
        }

    async def wait_quiet(self) -> None:
        """Return when no request is being answered."""
        await self._quiet.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._answering += 1
        self._quiet.clear()
        try:
            await self._handler(scope)(receive, send)
        except ClientLeft:
            pass
        except HeadraceError as e:
            await send_json(send, e.status, error(e.status, e.message, e.param))
        finally:
            self._answering -= 1
            if not self._answering:
                self._quiet.set()

    def _handler(self, scope: Scope) -> Handler:
        path, method = scope["path"], scope["method"]
        if path not in self._routes:
            return _raising(NotFound(f"no such path: {path}"))
        wanted, handler = self._routes[path]
        return (
            handler
            if method == wanted
            else _raising(MethodNotAllowed(f"{path} takes {wanted}, not {method}"))
        )

    async def _health(self, _receive: Receive, send: Send) -> None:
        await send_json(send, 200 if self._loop.alive else 503, None)

    async def _models(self, _receive: Receive, send: Send) -> None:
        card = {
            "id": self._model, "object": "model", "created": self._created, "owned_by": "headrace",
            "root": self._model, "parent": None, "max_model_len": self._loop.engine.max_context,
        }  # fmt: skip
        await send_json(send, 200, {"object": "list", "data": [card]})

    async def _metrics(self, _receive: Receive, send: Send) -> None:
        engine = self._loop.engine
        gauges = {
            "vllm:num_requests_running": engine.running,
            "vllm:num_requests_waiting": engine.waiting,
            "vllm:kv_cache_usage_perc": engine.kv_use,
        }
        lines = [
            f'# TYPE {name} gauge\n{name}{{model_name="{self._model}"}} {value}\n'
            for name, value in gauges.items()
        ]
        await send_body(send, 200, "".join(lines).encode(), b"text/plain; version=0.0.4")

    async def _tokenize(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, TokenizeBody)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = encode_chat([(message.role, message.text) for message in body.messages])
        else:
            tokens = encode(body.prompt or "")
        length = self._loop.engine.max_context
        await send_json(send, 200, {"count": len(tokens), "max_model_len": length, "tokens": tokens})

    async def _detokenize(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, DetokenizeBody)
        self._check_model(body.model)
        await send_json(send, 200, {"prompt": decode(body.tokens)})

    async def _reset_prefix_cache(self, _receive: Receive, send: Send) -> None:
        cleared = self._loop.clear_cache()
        await send_json(
            send, 200 if cleared else 503, None if cleared else error(503, "requests are running")
        )

    async def _chat(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, ChatBody)
        self._check_model(body.model)
        messages = [(message.role, message.text) for message in body.messages]
        prompt = encode_chat(messages, open_end=body.continue_final_message)
        answer = Answer(self._model, "chat.completion", body, self._loop)
        answer.submit([prompt], body.max_completion_tokens or body.max_tokens)
        await answer.send(receive, send)

    async def _complete(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, CompletionBody)
        self._check_model(body.model)
        answer = Answer(self._model, "text_completion", body, self._loop)
        answer.submit(_prompts(body.prompt), body.max_tokens or DEFAULT_COMPLETION_TOKENS)
        await answer.send(receive, send)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._model:
            raise ModelNotFound(
                f"the model {model!r} does not exist; this server has {self._model!r}", param="model"
            )


def _prompts(prompt: Any) -> list[list[int]]:
    """A text, a list of texts, token ids or a list of those, as token ids. Raises BadRequest."""
    if isinstance(prompt, str):
        return [encode(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return [encode(part) for part in prompt]
        nested = prompt if isinstance(prompt[0], list) else [prompt]
        try:
            return msgspec.convert(nested, list[list[TokenId]])
        except msgspec.ValidationError as e:
            raise BadRequest(f"prompt: {e}", param="prompt") from e
    raise BadRequest("prompt must be a text, a list of texts, token ids or a list of those", param="prompt")


async def _read(receive: Receive, form: type[Form]) -> Form:
    """The request's body as `form`. Raises BadRequest, or ClientLeft when it never came in full."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    try:
        return msgspec.json.decode(b"".join(parts), type=form)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise BadRequest(f"the request body cannot be read: {e}") from e


def _raising(reason: CallerError) -> Handler:
    async def refuse(_receive: Receive, _send: Send) -> None:
        raise reason

    return refuse
