"""The bytes a mock backend answers with, in vLLM's shapes, framed for HTTP/1.1 and ready to be written."""

from __future__ import annotations

import json

MODEL = "mock"
PROMPT_TOKENS = 256
CREATED = 1_700_000_000  # a constant: the same answer every time

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def framed(event: bytes) -> bytes:
    """One chunk of chunked transfer encoding."""
    return b"%x\r\n%b\r\n" % (len(event), event)


def full(body: bytes, status: bytes = b"200 OK", content_type: bytes = b"application/json") -> bytes:
    """A whole answer with a Content-Length."""
    return b"HTTP/1.1 %b\r\nserver: mock\r\ncontent-length: %d\r\ncontent-type: %b\r\n\r\n%b" % (
        status,
        len(body),
        content_type,
        body,
    )


def model_card(model: str) -> dict[str, object]:
    """One entry of `/v1/models`."""
    return {"id": model, "object": "model", "created": CREATED, "owned_by": "vllm", "max_model_len": 1 << 20}


def usage(completion_tokens: int) -> dict[str, object]:
    """vLLM's usage object."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def completion(chat: bool, model: str, completion_tokens: int) -> bytes:
    """The body of an unstreamed answer, about 600 bytes for chat."""
    text = " headrace" * 10
    if chat:
        choice: dict[str, object] = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": None,
        }
    else:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    return _compact(
        {
            "id": "chatcmpl-" + "0" * 32 if chat else "cmpl-" + "0" * 32,
            "object": "chat.completion" if chat else "text_completion",
            "created": CREATED,
            "model": model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(completion_tokens),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "kv_transfer_params": None,
        }
    )


def _envelope(chat: bool, model: str, answer_id: str, choices: list[dict[str, object]]) -> dict[str, object]:
    return {
        "id": answer_id,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": CREATED,
        "model": model,
        "choices": choices,
    }


def token_event(chat: bool, model: str, answer_id: str, text: str, last: bool) -> bytes:
    """One streamed token, about 250 bytes as an SSE event."""
    choice: dict[str, object] = {"index": 0}
    choice.update({"delta": {"content": text}} if chat else {"text": text})
    choice.update({"logprobs": None, "finish_reason": "length" if last else None, "token_ids": None})
    return b"data: " + _compact(_envelope(chat, model, answer_id, [choice])) + b"\n\n"


def usage_event(chat: bool, model: str, answer_id: str, completion_tokens: int) -> bytes:
    """The event that closes a stream whose client asked for usage."""
    body = _envelope(chat, model, answer_id, [])
    body["usage"] = usage(completion_tokens)
    return b"data: " + _compact(body) + b"\n\n"
