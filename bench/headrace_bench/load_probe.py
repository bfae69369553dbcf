"""What must be known of a server before it is loaded: its model, what it can do, what a word costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from headrace.errors import CallerError, ShortageError
from headrace_bench.answer_stream import error_message
from headrace_bench.exchange import Exchange, answer_of
from headrace_bench.load_client import LoadClient
from headrace_bench.prompt_text import Calibration, Passage, render

IGNORES_EOS = frozenset({"vllm", "sglang", "headrace"})
"""`owned_by` of servers that take `ignore_eos`; others may refuse a field they do not know."""

SAMPLE_WORDS = (32, 160)
"""Small, so that calibrating warms no cache and fits every model."""

Count = Callable[[dict[str, Any]], Awaitable[int | None]]
"""Prompt tokens of the fields that make a prompt; None where the server does not tell."""


class ProbeError(CallerError):
    """The server does not serve what was asked for. The message says what it serves."""


class Unreachable(ShortageError):
    """The server does not answer. The message names the URL."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the probe found."""

    model: str
    ignore_eos: bool
    calibration: Calibration


async def probe(
    client: LoadClient,
    model: str | None,
    endpoint: Literal["chat", "completions"],
    timeout_s: float = 60.0,
    body: Mapping[str, Any] | None = None,
) -> ServerFacts:
    """Ask the server. `model` None takes the only one served. Raises `ProbeError`, `Unreachable`."""
    found, owner = await _model(client, model, timeout_s)
    calibration = await _calibrate(_by_tokenize(client, found, timeout_s), endpoint, "tokenize")
    if calibration is None:
        calibration = await _calibrate(_by_usage(client, found, timeout_s, body or {}), endpoint, "usage")
    return ServerFacts(found, owner in IGNORES_EOS, calibration or Calibration())


async def _model(client: LoadClient, model: str | None, timeout_s: float) -> tuple[str, str]:
    answer = await client.exchange("GET", "/v1/models", timeout_s=timeout_s)
    target = client.target
    where = f"{'https' if target.tls else 'http'}://{target.host}:{target.port}{target.prefix}"
    if answer.error in ("connect", "timeout", "cut"):
        raise Unreachable(f"{where} does not answer: {answer.detail}; is the server running?")
    served = _models(answer) if answer.error is None else {}
    if model is None:
        if len(served) != 1:
            raise ProbeError(
                f"{where} serves {', '.join(served) or 'no list of models'}; choose one with --model"
            )
        model = next(iter(served))
    elif served and model not in served:
        raise ProbeError(f"{where} does not serve {model!r}; it serves {', '.join(served)}")
    return model, served.get(model, "")


def _models(answer: Exchange) -> dict[str, str]:
    try:
        listed = msgspec.json.decode(bytes(answer.body))["data"]
        return {str(entry["id"]): str(entry.get("owned_by", "")) for entry in listed}
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return {}


async def _calibrate(count: Count, endpoint: str, source: str) -> Calibration | None:
    """None where `count` cannot tell."""
    one, more = [await count(_prompt(endpoint, ("user", words))) for words in SAMPLE_WORDS]
    if one is None or more is None:
        return None
    line = Calibration.fit(SAMPLE_WORDS[0], one, SAMPLE_WORDS[1], more, source)
    if endpoint != "chat" or line.source != source:
        return line
    words = SAMPLE_WORDS[0]
    # A template may know no system role; what it would add is then never needed.
    system = await count(_prompt(endpoint, ("system", words), ("user", words)))
    turn = await count(_prompt(endpoint, ("user", words), ("assistant", words), ("user", words)))
    return replace(
        line,
        system_tokens=0.0 if system is None else system - one - words * line.tokens_per_word,
        turn_tokens=0.0 if turn is None else turn - one - 2 * words * line.tokens_per_word,
    )


def _prompt(endpoint: str, *messages: tuple[str, int]) -> dict[str, Any]:
    texts = [(role, render(0, (Passage("calibration", words),))) for role, words in messages]
    if endpoint == "completions":
        return {"prompt": "".join(text for _, text in texts)}
    return {"messages": [{"role": role, "content": text} for role, text in texts]}


def _by_tokenize(client: LoadClient, model: str, timeout_s: float) -> Count:
    """vLLM's /tokenize, which takes chat messages too. Counts None where it is not offered."""

    async def count(prompt: dict[str, Any]) -> int | None:
        body = msgspec.json.encode({"model": model} | prompt)
        answer = await client.exchange("POST", "/tokenize", body, timeout_s=timeout_s)
        try:
            return int(msgspec.json.decode(bytes(answer.body))["count"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            return None

    return count


def _by_usage(client: LoadClient, model: str, timeout_s: float, extra: Mapping[str, Any]) -> Count:
    """Requests for one token each; any OpenAI-compatible server says how long their prompts were.

    Raises `ProbeError` where the server refuses the first: it would refuse every request of the load as well.
    """
    accepted = False

    async def count(prompt: dict[str, Any]) -> int | None:
        nonlocal accepted
        path = "/v1/chat/completions" if "messages" in prompt else "/v1/completions"
        body = msgspec.json.encode({"model": model, "max_tokens": 1} | prompt | dict(extra))
        answer = await client.exchange("POST", path, body, timeout_s=timeout_s)
        if answer.error is not None:
            if accepted:
                return None
            told = error_message(bytes(answer.body)) if answer.body else answer.detail
            raise ProbeError(f"the server refuses a first small request ({answer.error}): {told}")
        accepted = True
        try:
            usage = answer_of(answer)[1]
        except ValueError as error:
            raise ProbeError(f"{path} answers something else than OpenAI's form: {error}") from error
        return usage.prompt_tokens if usage else None

    return count
