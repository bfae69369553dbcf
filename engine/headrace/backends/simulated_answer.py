"""One answer of the simulated server, streamed or whole, in OpenAI's form."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from headrace.backends.front_door import Receive, Send
from headrace.backends.simulated_forms import Body, error, usage
from headrace.backends.simulated_loop import Generation, SimulatedLoop
from headrace.backends.simulated_tokens import decode, write_answer
from headrace.errors import BadRequest

STOPPING = "the engine is stopping"


class Answer:
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
            self._generations.append(
                self._loop.submit(
                    name, prompt, tokens, self._body.cache_salt or "", transfer=self._body.kv_transfer_params
                )
            )

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
            await send_json(send, 503, error(503, STOPPING))
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
        whole |= {"kv_transfer_params": self._loop.held_params(self._generations[0])}
        if self._is_chat and self._body.return_token_ids:
            whole |= {"prompt_token_ids": list(self._generations[0].prompt)}
        await send_json(send, 200, whole)

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
                yield encode_json(error(503, STOPPING))
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


async def send_json(send: Send, status: int, value: Any) -> None:
    """Answer with `value` as JSON, or with an empty body for None."""
    await send_body(send, status, b"" if value is None else msgspec.json.encode(value), b"application/json")


async def send_body(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    """Answer with a whole body."""
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
