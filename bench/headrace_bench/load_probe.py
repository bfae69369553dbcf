"""What must be known of a server before it is loaded: its model, what it can do, what a word costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from headrace.errors import CallerError, ShortageError
from headrace_bench.answer_stream import error_message
from headrace_bench.load_client import Exchange, LoadClient, answer_of
from headrace_bench.prompt_text import Calibration, Passage, render

IGNORES_EOS = frozenset({"vllm", "sglang", "headrace"})
"""`owned_by` of servers that take `ignore_eos`; others may refuse a field they do not know."""

SAMPLE_WORDS = (32, 160)
"""Small, so that calibrating warms no cache and fits every model."""


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
    calibration = await _by_tokenize(client, found, endpoint, timeout_s)
    if calibration is None:
        calibration = await _by_usage(client, found, endpoint, timeout_s, dict(body or {}))
    return ServerFacts(found, owner in IGNORES_EOS, calibration)


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


def _sample(endpoint: str, words: int) -> dict[str, Any]:
    text = render(0, (Passage("calibration", words),))
    return (
        {"prompt": text} if endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}
    )


async def _by_tokenize(client: LoadClient, model: str, endpoint: str, timeout_s: float) -> Calibration | None:
    """vLLM's /tokenize, which takes chat messages too. None where it is not offered."""
    counts = []
    for words in SAMPLE_WORDS:
        body = msgspec.json.encode({"model": model} | _sample(endpoint, words))
        answer = await client.exchange("POST", "/tokenize", body, timeout_s=timeout_s)
        try:
            counts.append(int(msgspec.json.decode(bytes(answer.body))["count"]))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            return None
    return Calibration.fit(SAMPLE_WORDS[0], counts[0], SAMPLE_WORDS[1], counts[1], "tokenize")


async def _by_usage(
    client: LoadClient, model: str, endpoint: str, timeout_s: float, extra: dict[str, Any]
) -> Calibration:
    """Two requests for one token each; any OpenAI-compatible server says how long their prompts were.

    Raises `ProbeError` where the server refuses them: it would refuse every request of the load as well.
    """
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    counts = []
    for words in SAMPLE_WORDS:
        body = msgspec.json.encode({"model": model, "max_tokens": 1} | _sample(endpoint, words) | extra)
        answer = await client.exchange("POST", path, body, timeout_s=timeout_s)
        if answer.error is not None:
            told = error_message(bytes(answer.body)) if answer.body else answer.detail
            raise ProbeError(f"the server refuses a first small request ({answer.error}): {told}")
        try:
            usage = answer_of(answer)[1]
        except ValueError as error:
            raise ProbeError(f"{path} answers something else than OpenAI's form: {error}") from error
        if usage is None:
            return Calibration()
        counts.append(usage.prompt_tokens)
    return Calibration.fit(SAMPLE_WORDS[0], counts[0], SAMPLE_WORDS[1], counts[1], "usage")
