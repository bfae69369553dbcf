"""OpenAI's wire forms: which paths are inference, what is read from a body, how errors and usage look.

Only the fields that routing needs are decoded; the original bytes travel on. Pure functions, no sockets.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from headrace.errors import BadRequest, Bug, HeadraceError, ShortageError

# What vLLM 0.32 serves for inference, POST all of them. Its control endpoints (sleep, collective_rpc, LoRA loading,
# cache resets, weights, profiling, server_info) stand on no list and so can never be reached from outside.
INFERENCE_PATHS: frozenset[bytes] = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/chat/completions/batch",
        b"/v1/completions",
        b"/v1/responses",
        b"/v1/messages",
        b"/v1/messages/count_tokens",
        b"/v1/embeddings",
        b"/v1/score",
        b"/v1/rerank",
        b"/v2/rerank",
        b"/v2/embed",
        b"/v1/audio/transcriptions",
        b"/v1/audio/translations",
        b"/tokenize",
        b"/detokenize",
        b"/rerank",
        b"/score",
        b"/pooling",
        b"/classify",
        b"/generative_scoring",
    }
)
_USAGE_ON_REQUEST = frozenset({b"/v1/chat/completions", b"/v1/completions"})


class _Fields(msgspec.Struct):
    """What the gateway reads of a JSON body. `object` where a wrong type must not fail the decoding."""

    model: object = None
    stream: object = None
    stream_options: object = None
    user: object = None
    max_tokens: object = None
    max_completion_tokens: object = None


class Parsed(NamedTuple):
    """The fields that routing and relaying need, checked."""

    model: str
    stream: bool
    user: str | None
    max_tokens: int | None
    usage_wanted: bool  # the client itself asked for the usage chunk of a stream


class Usage(NamedTuple):
    """Token counts as the engine reported them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


_decode_fields = msgspec.json.Decoder(_Fields).decode
_encode = msgspec.json.Encoder().encode


def parse_body(body: bytes, json_depth: int) -> Parsed:
    """Read the needed fields of a JSON body.

    Raises BadRequest naming what is wrong: not UTF-8, not JSON, nested deeper than `json_depth` (a hostile body
    must not reach an engine's recursive parser), `model` missing or not a string.
    """
    if not body:
        raise BadRequest("the request body is empty; send a JSON object")
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the body is not valid UTF-8 at byte {error.start}") from None
    try:
        fields = _decode_fields(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not a valid JSON object: {error}") from None
    if _too_deep(body, json_depth):
        raise BadRequest(f"the body is nested deeper than {json_depth} levels")
    model = fields.model
    if not isinstance(model, str):
        if model is None:
            raise BadRequest("you must provide a model parameter", param="model")
        raise BadRequest(f"model must be a string, not {_json_type(model)}", param="model")
    options = fields.stream_options
    max_tokens = fields.max_completion_tokens or fields.max_tokens
    return Parsed(
        model=model,
        stream=fields.stream is True,
        user=fields.user if isinstance(fields.user, str) else None,
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
        usage_wanted=options is not None,
    )


def _too_deep(body: bytes, limit: int) -> bool:
    """Whether the JSON text nests deeper than `limit`. Counts first: most bodies have fewer brackets than that."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for match in _STRUCTURE.finditer(body):
        token = match[0]
        if token in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif token in b"]}":
            depth -= 1
    return False


_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _json_type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)


_FORM_MODEL = re.compile(
    rb'content-disposition:[^\r\n]*\bname="?model"?[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{0,512})\r\n--',
    re.IGNORECASE,
)


def parse_form(body: bytes) -> Parsed:
    """Read `model` and `stream` from a multipart form (the audio endpoints). Raises BadRequest without a model."""
    match = _FORM_MODEL.search(body)
    if match is None:
        raise BadRequest("you must provide a model parameter", param="model")
    try:
        model = match[1].decode()
    except UnicodeDecodeError:
        raise BadRequest("model is not valid UTF-8", param="model") from None
    return Parsed(model, stream=False, user=None, max_tokens=None, usage_wanted=True)


def asks_usage(path: bytes, parsed: Parsed) -> bool:
    """Whether the usage of this stream must be asked for in the client's stead (and taken out of its answer)."""
    return parsed.stream and not parsed.usage_wanted and path in _USAGE_ON_REQUEST


def with_usage(body: bytes) -> bytes:
    """The same JSON object, asking for a usage chunk. One splice: re-encoding would rename or reorder fields."""
    start = body.index(b"{") + 1
    return b'{"stream_options":{"include_usage":true},' + body[start:]


# A quote inside a JSON string is escaped, so an unescaped `"usage":{` can only be the field itself.
_USAGE = re.compile(rb'"usage":\s?(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_decode_usage = msgspec.json.Decoder(dict[str, Any]).decode


def find_usage(data: bytes) -> Usage | None:
    """The last usage object in (part of) an answer, in OpenAI's or Anthropic's names. None when there is none."""
    at = data.rfind(b'"usage":')
    if at < 0:
        return None
    match = _USAGE.match(data, at)
    if match is None:
        return None
    try:
        usage = _decode_usage(match[1])
    except msgspec.DecodeError:
        return None
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        completion_tokens=_count(usage.get("completion_tokens", usage.get("output_tokens"))),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def error_body(error: HeadraceError) -> bytes:
    """OpenAI's error body."""
    return _encode(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_event(error: HeadraceError) -> bytes:
    """An error as a server-sent event, for streams that have begun."""
    return b"data: " + error_body(error) + b"\n\n"


def error_headers(error: HeadraceError) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error body."""
    headers = [(b"content-type", b"application/json")]
    if isinstance(error, ShortageError):
        headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after_s))))
    return headers


def as_headrace_error(error: BaseException) -> HeadraceError:
    """An error of ours as it is; anything else as a Bug that tells the client nothing of our insides."""
    if isinstance(error, HeadraceError):
        return error
    return Bug("the gateway failed on this request; this is a bug in Headrace, please report it")


# Unique without a system call per request (uuid4 costs one): a random name of this process and a counter.
_PROCESS = uuid4().hex[:16].encode()
_requests = count(1)
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:@=+/-]{1,128}")


def request_id(given: bytes | None) -> bytes:
    """The client's request id when it is short and plain, a new one otherwise."""
    if given is not None and _SAFE_ID.fullmatch(given):
        return given
    return b"%s-%x" % (_PROCESS, next(_requests))
