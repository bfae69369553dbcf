"""Server-sent events of OpenAI's streams, and the few fields of an answer that a load client needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens found in the cache; None where the server does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    text: str | None = None  # completions
    delta: Delta | None = None  # chat, streamed
    message: Delta | None = None  # chat, whole
    finish_reason: str | None = None

    @property
    def said(self) -> str | None:
        """Its text, "" where it carries something else (reasoning, a tool call), None for nothing."""
        if self.text:
            return self.text
        part = self.delta or self.message
        if part is None:
            return None
        if part.content:
            return part.content
        return "" if part.reasoning_content or part.reasoning or part.tool_calls else None


class Answer(msgspec.Struct):
    """A chunk of a stream, or a whole answer."""

    choices: list[Choice] = msgspec.field(default_factory=list)
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Answer).decode


def decode_answer(data: bytes) -> Answer:
    """Raises `msgspec.DecodeError` (or its subclass) on anything that is no answer."""
    return _decode(data)


def error_message(data: bytes) -> str:
    """One line out of an error body, OpenAI's or any other, at most 200 characters."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = None
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", error)
    text = str(error) if error else data[:400].decode("utf-8", "replace")
    return " ".join(text.split())[:200]


@dataclass(slots=True)
class EventSplitter:
    """Cuts a byte stream into the payloads of its `data:` lines. Mutable, one per answer.

    A line that grows over `max_line` bytes is an error, so that a server cannot fill the client's memory.
    """

    max_line: int = 16 * 1024 * 1024
    _rest: bytes = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads completed by `data`, in order. Raises `ValueError` on an endless line."""
        if self._rest:
            data = self._rest + data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > self.max_line:
            raise ValueError(f"an event line is over {self.max_line} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
