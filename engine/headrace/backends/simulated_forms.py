"""What the simulated server reads and writes: the part of OpenAI's and vLLM's wire forms that it understands.

Fields it does not know are ignored, as a model without opinions would (temperature, stop, tools, ...).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from headrace.backends.simulated_tokens import MAX_TOKEN_ID

Count = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_ID)]


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = False


class Part(msgspec.Struct):
    """One part of a message; only text has tokens here."""

    type: str
    text: str = ""


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Body(msgspec.Struct, kw_only=True):
    """What chat and completions share."""

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    continue_final_message: bool = False


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions. A union of lists is more than msgspec takes, so `prompt` is converted later."""

    prompt: Any


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The `usage` object, with vLLM's prompt token details."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The error body as vLLM writes it: `code` is the HTTP status."""
    names = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError"}
    kind = names.get(status, "ServiceUnavailableError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
