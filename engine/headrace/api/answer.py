"""What comes back from a model, read from OpenAI's wire forms. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """Tokens as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the replica's KV cache; 0 where the engine does not tell


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer. `text` is that of the first choice; everything else a server says is in `raw`."""

    text: str
    finish_reason: str | None  # "stop", "length", "tool_calls", ...; None of a stream that was left early
    model: str
    id: str
    usage: Usage | None
    raw: Mapping[str, Any]
    """OpenAI's body: tool calls, log probabilities, further choices. Of a stream its last chunk."""

    def __str__(self) -> str:
        return self.text


def read_answer(body: Mapping[str, Any]) -> Answer:
    """A whole body of /v1/chat/completions or /v1/completions. Raises ValueError when it is none."""
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return Answer(
            text=text or "",
            finish_reason=choice.get("finish_reason"),
            model=body.get("model", ""),
            id=body.get("id", ""),
            usage=_usage(body),
            raw=body,
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not a completion: {str(body)[:200]}") from error


class StreamedAnswer:
    """An answer that grows with the chunks of a stream."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._last: Mapping[str, Any] = {}

    def take(self, chunk: Mapping[str, Any]) -> str:
        """The text that a chunk adds to the first choice, perhaps none. Raises ValueError when it is no chunk."""
        try:
            self._last = chunk
            self._usage = _usage(chunk) or self._usage
            text = ""
            for choice in chunk.get("choices") or ():
                if choice.get("index", 0) != 0:
                    continue
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
                delta = choice.get("delta")
                text += (delta.get("content") if delta is not None else choice.get("text")) or ""
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not a chunk of a completion: {str(chunk)[:200]}") from error
        if text:
            self._texts.append(text)
        return text

    @property
    def answer(self) -> Answer:
        """As far as it has come."""
        return Answer(
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            model=self._last.get("model", ""),
            id=self._last.get("id", ""),
            usage=self._usage,
            raw=self._last,
        )


def _usage(body: Mapping[str, Any]) -> Usage | None:
    usage = body.get("usage")
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or 0,
        details.get("cached_tokens") or 0,
    )
