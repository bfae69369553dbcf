"""Reading wire forms, refusals included."""

import pytest

from headrace.api.answer import StreamedAnswer, Usage, read_answer
from headrace.api.error_reply import error_of
from headrace.errors import (
    BadRequest,
    BodyTooLarge,
    CallerError,
    NoReplica,
    ShortageError,
    ShuttingDown,
    Unauthorized,
    UpstreamTimeout,
)


def test_an_answer_of_tool_calls_has_no_text() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    body = {"id": "a", "model": "m", "choices": [{"message": message, "finish_reason": "tool_calls"}]}
    answer = read_answer(body)
    assert (answer.text, answer.finish_reason, answer.usage) == ("", "tool_calls", None)
    assert answer.raw["choices"][0]["message"]["tool_calls"]


def test_cached_tokens_are_told_where_the_engine_tells_them() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
    body = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": usage}
    assert read_answer(body).usage == Usage(9, 2, 8)
    assert read_answer({**body, "usage": {**usage, "prompt_tokens_details": None}}).usage == Usage(9, 2, 0)


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{}]}, [], None, {"choices": None}])
def test_what_is_no_answer_is_refused(body: object) -> None:
    with pytest.raises(ValueError, match="not a completion"):
        read_answer(body)  # type: ignore[arg-type]


def test_a_stream_of_several_choices_gives_the_first_ones_text() -> None:
    read = StreamedAnswer()
    texts = [
        read.take({"choices": [{"index": index, "text": f"{index}{n}"}]})
        for n in range(2)
        for index in (0, 1)
    ]
    read.take({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    read.take({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    assert texts == ["00", "", "01", ""]
    assert (read.answer.text, read.answer.finish_reason, read.answer.usage) == ("0001", "stop", Usage(1, 2))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, None, BadRequest),
        (400, 400, BadRequest),
        (401, "invalid_api_key", Unauthorized),
        (413, None, BodyTooLarge),
        (418, None, CallerError),
        (503, "no_replica", NoReplica),
        (503, "shutting_down", ShuttingDown),
        (503, None, ShortageError),
        (504, "upstream_timeout", UpstreamTimeout),
        (529, None, ShortageError),
    ],
)
def test_a_refusal_becomes_what_it_was_there(status: int, code: object, kind: type) -> None:
    body = f'{{"error": {{"message": "no", "code": {"null" if code is None else repr(code)}}}}}'
    error = error_of(status, body.replace("'", '"').encode(), 7.0)
    assert isinstance(error, kind)
    assert (error.message, error.status) == ("no", status)
    if isinstance(error, ShortageError):
        assert error.retry_after_s == 7.0


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "no"}', b'{"message": "no"}'])
def test_a_refusal_in_no_known_form_still_is_one(body: bytes) -> None:
    assert error_of(502, body).message
