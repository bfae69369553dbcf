"""Finding the end of an answer, however it is cut into reads."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_bench import mock_answers as answers
from headrace_bench.http_wire import AnswerScanner, address, post
from headrace_bench.prompt_bodies import bodies

WHOLE = answers.full(answers.completion(True, "m", 16))
STREAM = (
    answers.STREAM_HEAD
    + answers.framed(answers.token_event(True, "m", "chatcmpl-1", " a", last=False))
    + answers.framed(answers.DONE)
    + answers.LAST_CHUNK
)
EMPTY = answers.full(b"")


def feed_in_parts(scanner: AnswerScanner, data: bytes, cuts: list[int]) -> list[bool]:
    edges = [0, *sorted({cut % (len(data) - 1) + 1 for cut in cuts}), len(data)]
    return [scanner.feed(data[start:end]) for start, end in pairwise(edges) if start < end]


@given(
    st.lists(st.sampled_from([WHOLE, STREAM]), min_size=1, max_size=4),
    st.lists(st.integers(0, 5000), max_size=8),
)
def test_answers_cut_anywhere_end_exactly_once(sequence: list[bytes], cuts: list[int]) -> None:
    scanner = AnswerScanner()
    for data in sequence:
        ends = feed_in_parts(scanner, data, cuts)
        assert ends[-1] and not any(ends[:-1])


def test_an_empty_answer_ends_with_its_head() -> None:
    assert AnswerScanner().feed(EMPTY)


def test_an_error_answer_is_not_taken_for_an_answer() -> None:
    with pytest.raises(ValueError, match="status 503"):
        AnswerScanner().feed(answers.full(b"{}", b"503 Service Unavailable"))


def test_bytes_after_the_end_are_noticed() -> None:
    with pytest.raises(ValueError, match="2 bytes after"):
        AnswerScanner().feed(WHOLE + b"xx")


def test_address_names_the_url_without_a_port() -> None:
    assert address("http://127.0.0.1:80/v1") == ("127.0.0.1", 80)
    with pytest.raises(ValueError, match="no host or no port"):
        address("http://localhost")


@pytest.mark.parametrize("size", [512, 1024, 32768])
def test_bodies_have_the_size_asked_for_and_share_prefixes(size: int) -> None:
    made = bodies(size, count=8, families=2, seed=1)
    assert {len(body) for body in made} == {size}
    assert made == bodies(size, count=8, families=2, seed=1)
    prompts = [json.loads(body)["messages"][1]["content"] for body in made]
    shared = len(prompts[0]) * 7 // 10
    assert prompts[0][:shared] == prompts[2][:shared] != prompts[1][:shared]
    assert prompts[0] != prompts[2]


def test_a_body_too_small_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 256"):
        bodies(100, 1, 1, 0)


def test_post_states_the_length_of_its_body() -> None:
    head, _, body = post(b"{}").partition(b"\r\n\r\n")
    assert b"content-length: 2" in head and body == b"{}"
