"""Reading the wire forms."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.openai import Usage, find_usage, parse_body, with_usage

COUNTS = st.integers(0, 10**9)


@given(prompt=COUNTS, completion=COUNTS, cached=st.none() | COUNTS, text=st.text(max_size=40))
def test_usage_is_found_however_it_is_written(
    prompt: int, completion: int, cached: int | None, text: str
) -> None:
    details = None if cached is None else {"cached_tokens": cached, "created_cache_tokens": 3}
    usage = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
    }
    shuffled = dict(reversed(usage.items()))
    for form in (usage, shuffled):
        answer = {"choices": [{"text": text + '"usage":{"prompt_tokens":1}'}], "usage": form, "more": None}
        for separators in ((",", ":"), (", ", ": ")):
            data = json.dumps(answer, separators=separators).encode()
            assert find_usage(data) == Usage(prompt, completion, cached or 0)


@pytest.mark.parametrize(
    ("data", "usage"),
    [
        (b'{"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}}', Usage(5, 3, 0)),
        (
            b'{"usage":{"input_tokens":5,"output_tokens":3,"input_tokens_details":{"cached_tokens":2}}}',
            Usage(5, 3, 2),
        ),
        (b'{"usage":{"prompt_tokens":5,"total_tokens":5}}', Usage(5, 0, 0)),
        (b'{"usage":null}', None),
        (b"", None),
        (b'{"usage":{"prompt_tokens":', None),
        (b'{"usage":{"prompt_tokens":"x"}}', None),
    ],
)
def test_usage_of_other_shapes(data: bytes, usage: Usage | None) -> None:
    assert find_usage(data) == usage


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=4))
def test_asking_for_usage_changes_nothing_else(fields: dict[str, int]) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    asked = json.loads(with_usage(body))
    assert asked.pop("stream_options") == {"include_usage": True}
    assert asked == json.loads(body)


def test_only_what_routing_needs_is_read() -> None:
    parsed = parse_body(b'{"model":"m","stream":"yes","max_tokens":"x","user":7,"unknown":[{}]}', 8)
    assert parsed.model == "m"
    assert parsed.stream != True  # noqa: E712 - a wrong type is the engine's to refuse
