"""OpenAI's wire forms: which paths are inference, what is read from a body, how errors and usage look.

Only the fields that routing needs are decoded; the original bytes travel on. Pure functions, no sockets.
"""

from __future__ import annotations

import re
from itertools import count
from typing import NamedTuple
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


class Parsed(msgspec.Struct, gc=False):
    """The fields of a body that routing and relaying need. `object` where a wrong type is the engine's to refuse."""

    model: str = ""
    stream: object = False
    stream_options: object = None
    user: object = None
    max_tokens: object = None
    max_completion_tokens: object = None
    priority: object = None


class Usage(NamedTuple):
    """Token counts as the engine reported them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


_decode_fields = msgspec.json.Decoder(Parsed).decode
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
        parsed = _decode_fields(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if _too_deep(body, json_depth):
        raise BadRequest(f"the body is nested deeper than {json_depth} levels")
    if not parsed.model:
        raise BadRequest("you must provide a model parameter", param="model")
    return parsed


def _wrong_type(error: msgspec.ValidationError) -> BadRequest:
    """msgspec says "Expected `str`, got `int` - at `$.model`"."""
    words = str(error)
    if words.endswith("`$.model`"):
        return BadRequest(f"model must be a string: {words.partition(' - ')[0].lower()}", param="model")
    return BadRequest(f"the body must be a JSON object: {words.lower()}")


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
    return Parsed(model)


def asks_usage(path: bytes, parsed: Parsed) -> bool:
    """Whether the usage of this stream must be asked for in the client's stead (and taken out of its answer)."""
    return parsed.stream is True and parsed.stream_options is None and path in _USAGE_ON_REQUEST


def with_usage(body: bytes) -> bytes:
    """The same JSON object, asking for a usage chunk. One splice: re-encoding would rename or reorder fields."""
    start = body.index(b"{") + 1
    return b'{"stream_options":{"include_usage":true},' + body[start:]


# A quote inside a JSON string is escaped, so an unescaped `"usage":{` can only be the field itself.
_USAGE = re.compile(rb'"usage":\s?(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = 0


class _UsageFields(msgspec.Struct, gc=False):
    """OpenAI's names, and Anthropic's."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    input_tokens_details: _Details | None = None


_decode_usage = msgspec.json.Decoder(_UsageFields).decode


# The same, as vLLM writes it: a match saves the decoding.
_VLLM_USAGE = re.compile(
    rb'"usage":\{"prompt_tokens":(\d+),"total_tokens":\d+,"completion_tokens":(\d+)'
    rb'(?:,"prompt_tokens_details":(?:null|\{"cached_tokens":(\d+)))?[,}]'
)


def find_usage(data: bytes) -> Usage | None:
    """The last usage object in (part of) an answer, in OpenAI's or Anthropic's names. None when there is none."""
    at = data.rfind(b'"usage":')
    if at < 0:
        return None
    match = _VLLM_USAGE.match(data, at)
    if match is not None:
        prompt, completion, cached = match.groups(b"0")
        return Usage(int(prompt), int(completion), int(cached))
    match = _USAGE.match(data, at)
    if match is None:
        return None
    try:
        usage = _decode_usage(match[1])
    except msgspec.DecodeError:
        return None
    details = usage.prompt_tokens_details or usage.input_tokens_details
    return Usage(
        usage.prompt_tokens or usage.input_tokens or 0,
        usage.completion_tokens or usage.output_tokens or 0,
        details.cached_tokens or 0 if details is not None else 0,
    )


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def error_body(error: HeadraceError, path: bytes = b"") -> bytes:
    """OpenAI's error body; Anthropic's where the path is of its API."""
    if path.startswith(b"/v1/messages"):
        default = "invalid_request_error" if error.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(error.status, default)
        return _encode({"type": "error", "error": {"type": kind, "message": error.message}})
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


def unknown_model(model: str, known: list[str]) -> str:
    """What to tell whoever asks for a model that is not served."""
    return f"The model `{model[:256]}` does not exist. Known models: {', '.join(known)}"


def error_event(error: HeadraceError) -> bytes:
    """An error as a server-sent event, for streams that have begun."""
    return b"data: " + error_body(error) + b"\n\n"


def error_fields(error: HeadraceError, request_id: bytes) -> bytes:
    """The header lines that go with an error body."""
    fields = b"content-type: application/json\r\nx-request-id: %b\r\n" % request_id
    if isinstance(error, ShortageError):
        fields += b"retry-after: %d\r\n" % max(1, round(error.retry_after_s))
    return fields


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
