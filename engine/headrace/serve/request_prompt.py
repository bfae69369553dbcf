"""The prompt of a request as Ray Serve LLM passes it on, as bytes that equal prompts begin with equally."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_FIRST = ("tools", "system")
"""What a chat template puts before the messages."""

_PROMPTS = ("messages", "prompt", "input")


def prompt_bytes(arguments: Sequence[Any]) -> bytes:
    """Of the first argument that has one; nothing is rendered. Empty where none has: then only load decides."""
    for argument in arguments:
        for name in _PROMPTS:
            prompt = _field(argument, name)
            if prompt:
                parts = [value for first in _FIRST if (value := _field(argument, first))]
                return b"".join(map(_encode, (*parts, *_pieces(prompt))))
    return b""


def max_tokens(arguments: Sequence[Any]) -> int | None:
    """The bound on the answer's length that the request brings."""
    for argument in arguments:
        for name in ("max_completion_tokens", "max_tokens"):
            bound = _field(argument, name)
            if isinstance(bound, int):
                return bound
    return None


def is_stream(arguments: Sequence[Any]) -> bool:
    """Whether the answer comes token by token, so that its first piece means a first token."""
    return any(_field(argument, "stream") is True for argument in arguments)


def _field(argument: Any, name: str) -> Any:
    return argument.get(name) if isinstance(argument, Mapping) else getattr(argument, name, None)


def _pieces(prompt: Any) -> Sequence[Any]:
    """Messages one by one, so that a longer conversation begins with the bytes of the shorter one."""
    return prompt if isinstance(prompt, list | tuple) else (prompt,)


def _encode(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return msgspec.json.encode(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """Pydantic's models, which msgspec does not know; whatever else comes need only be the same each time."""
    dump = getattr(value, "model_dump", None)
    return dump(exclude_none=True) if callable(dump) else str(value)
