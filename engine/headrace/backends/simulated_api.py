"""The HTTP face of a simulated engine, in raw ASGI: OpenAI's chat and completions, vLLM's side endpoints.

A client that leaves aborts its request in the engine at once, as with vLLM.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from headrace.backends.front_door import Receive, Scope, Send
from headrace.backends.simulated_forms import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenId,
    TokenizeBody,
    error,
    usage,
)
from headrace.backends.simulated_loop import Generation, SimulatedLoop
from headrace.backends.simulated_tokens import decode, encode, encode_chat, write_answer
from headrace.errors import BadRequest, CallerError, HeadraceError, MethodNotAllowed, ModelNotFound, NotFound

Form = TypeVar("Form")
Handler = Callable[[Receive, Send], Awaitable[None]]

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_STOPPING = "the engine is stopping"


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
            await _send_json(send, e.status, error(e.status, e.message, e.param))
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
        await _send_json(send, 200 if self._loop.alive else 503, None)

    async def _models(self, _receive: Receive, send: Send) -> None:
        card = {
            "id": self._model, "object": "model", "created": self._created, "owned_by": "headrace",
            "root": self._model, "parent": None, "max_model_len": self._loop.engine.max_context,
        }  # fmt: skip
        await _send_json(send, 200, {"object": "list", "data": [card]})

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
        await _send(send, 200, "".join(lines).encode(), b"text/plain; version=0.0.4")

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
        await _send_json(send, 200, {"count": len(tokens), "max_model_len": length, "tokens": tokens})

    async def _detokenize(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, DetokenizeBody)
        self._check_model(body.model)
        await _send_json(send, 200, {"prompt": decode(body.tokens)})

    async def _reset_prefix_cache(self, _receive: Receive, send: Send) -> None:
        cleared = self._loop.clear_cache()
        await _send_json(
            send, 200 if cleared else 503, None if cleared else error(503, "requests are running")
        )

    async def _chat(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, ChatBody)
        self._check_model(body.model)
        messages = [(message.role, message.text) for message in body.messages]
        prompt = encode_chat(messages, open_end=body.continue_final_message)
        answer = _Answer(self._model, "chat.completion", body, self._loop)
        answer.submit([prompt], body.max_completion_tokens or body.max_tokens)
        await answer.send(receive, send)

    async def _complete(self, receive: Receive, send: Send) -> None:
        body = await _read(receive, CompletionBody)
        self._check_model(body.model)
        answer = _Answer(self._model, "text_completion", body, self._loop)
        answer.submit(_prompts(body.prompt), body.max_tokens or DEFAULT_COMPLETION_TOKENS)
        await answer.send(receive, send)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._model:
            raise ModelNotFound(
                f"the model {model!r} does not exist; this server has {self._model!r}", param="model"
            )


class _Answer:
    """One HTTP answer: one generation per prompt, streamed or whole."""

    def __init__(self, model: str, kind: str, body: Body, loop: SimulatedLoop) -> None:
        if body.n not in (None, 1):
            raise BadRequest(f"n is {body.n}; the simulated engine gives 1 answer per prompt", param="n")
        self._is_chat = kind == "chat.completion"
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12)
        self._head = {"id": self._id, "object": kind, "created": int(time.time()), "model": model}
        self._body = body
        self._loop = loop
        self._generations: list[Generation] = []
        self._ends: list[str] = []

    def submit(self, prompts: list[list[int]], max_tokens: int | None) -> None:
        """Hand every prompt to the engine, or none. Raises BadRequest naming the bound that one exceeds."""
        bound = self._loop.engine.max_context
        for prompt in prompts:
            if not prompt:
                raise BadRequest("the prompt is empty; it must hold at least 1 token", param="prompt")
            if len(prompt) + (max_tokens or 1) > bound:
                raise BadRequest(
                    f"this model's maximum context length is {bound} tokens, but the prompt has {len(prompt)} and"
                    f" {max_tokens or 1} were asked for; shorten the prompt or lower max_tokens",
                    param="messages" if self._is_chat else "prompt",
                )
        for index, prompt in enumerate(prompts):
            limit = max_tokens or bound - len(prompt)
            tokens, stopped = write_answer(
                prompt, limit, min_tokens=self._body.min_tokens, ignore_eos=self._body.ignore_eos
            )
            self._ends.append("stop" if stopped else "length")
            name = f"{self._id}-{index}"
            self._generations.append(self._loop.submit(name, prompt, tokens, self._body.cache_salt or ""))

    async def send(self, receive: Receive, send: Send) -> None:
        """Answer; abort in the engine whatever is unfinished when the client leaves or the server stops."""
        answering = asyncio.ensure_future(self._stream(send) if self._body.stream else self._send_whole(send))
        leaving = asyncio.ensure_future(_client_leaves(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for generation in self._generations:
                self._loop.abort(generation)
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _send_whole(self, send: Send) -> None:
        for generation in self._generations:
            while await generation.next_tokens():
                pass
        if any(generation.is_cut for generation in self._generations):
            await _send_json(send, 503, error(503, _STOPPING))
            return
        choices = []
        for index, generation in enumerate(self._generations):
            text = decode(generation.answer)
            said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choice: dict[str, Any] = {
                "index": index,
                **said,
                "logprobs": None,
                "finish_reason": self._ends[index],
            }
            if self._body.return_token_ids:
                choice |= {"token_ids": generation.answer}
                if not self._is_chat:
                    choice |= {"prompt_token_ids": list(generation.prompt)}
            choices.append(choice)
        whole = self._head | {"choices": choices, "usage": self._usage()}
        if self._is_chat and self._body.return_token_ids:
            whole |= {"prompt_token_ids": list(self._generations[0].prompt)}
        await _send_json(send, 200, whole)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self._chunks():
            await send({"type": "http.response.body", "body": b"data: " + chunk + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[bytes]:
        head = self._head | {"object": "chat.completion.chunk"} if self._is_chat else self._head
        encode_json = msgspec.json.encode
        # Several prompts are told one after another; they are computed side by side all the same.
        for index, generation in enumerate(self._generations):
            has_begun = False
            while tokens := await generation.next_tokens():
                if self._is_chat and not has_begun:
                    has_begun = True
                    opening = {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "finish_reason": None,
                    }
                    yield encode_json(head | {"choices": [opening]})
                text = decode(tokens)
                said = {"delta": {"content": text}} if self._is_chat else {"text": text}
                end = self._ends[index] if generation.is_over else None
                choice: dict[str, Any] = {"index": index, **said, "logprobs": None, "finish_reason": end}
                if self._body.return_token_ids:
                    choice |= {"token_ids": tokens}
                yield encode_json(head | {"choices": [choice]})
            if generation.is_cut:
                yield encode_json(error(503, _STOPPING))
                return
        if self._body.wants_usage:
            yield encode_json(head | {"choices": [], "usage": self._usage()})
        yield b"[DONE]"

    def _usage(self) -> dict[str, Any]:
        return usage(
            sum(len(generation.prompt) for generation in self._generations),
            sum(generation.produced for generation in self._generations),
            sum(generation.cached_tokens for generation in self._generations),
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


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(send: Send, status: int, value: Any) -> None:
    await _send(send, status, b"" if value is None else msgspec.json.encode(value), b"application/json")


async def _send(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _raising(reason: CallerError) -> Handler:
    async def refuse(_receive: Receive, _send: Send) -> None:
        raise reason

    return refuse
