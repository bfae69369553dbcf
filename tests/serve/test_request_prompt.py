"""What of a request makes its prompt, for the request router."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray.serve")

from headrace.serve.request_prompt import is_stream, max_tokens, prompt_bytes

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}), min_size=1
)


@given(messages, messages)
def test_a_longer_conversation_begins_with_the_shorter_one(first: list[Any], more: list[Any]) -> None:
    assert prompt_bytes([{"messages": first + more}]).startswith(prompt_bytes([{"messages": first}]))


@given(messages)
def test_a_request_object_and_a_mapping_are_the_same(said: list[Any]) -> None:
    assert prompt_bytes([SimpleNamespace(messages=said)]) == prompt_bytes([None, {"messages": said}])


def test_tools_come_before_messages() -> None:
    said = [{"role": "user", "content": "hi"}]
    assert prompt_bytes([{"messages": said, "tools": [{"x": 1}]}]).endswith(
        prompt_bytes([{"messages": said}])
    )


@pytest.mark.parametrize("arguments", [[], [None], [3], [{}], [{"messages": None}], [{"prompt": ""}]])
def test_without_a_prompt_there_are_no_bytes(arguments: list[Any]) -> None:
    assert prompt_bytes(arguments) == b""


def test_whatever_a_message_holds_has_bytes() -> None:
    class Part:
        def model_dump(self, exclude_none: bool) -> dict[str, str]:
            return {"type": "text"}

    assert prompt_bytes([{"messages": [{"content": [Part(), object]}]}])
    assert prompt_bytes([{"prompt": [1, 2, 3]}]) and prompt_bytes([{"prompt": "\ud800"}])


def test_bounds_and_streams_are_read() -> None:
    assert max_tokens([{"max_tokens": 5}]) == 5
    assert max_tokens([{"max_tokens": 5, "max_completion_tokens": 6}]) == 6
    assert max_tokens([{}]) is None
    assert is_stream([{"stream": True}]) and not is_stream([{"stream": False}, None])
