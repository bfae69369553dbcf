"""The toy language: reversible, prefix-stable, deterministic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.simulated_tokens import decode, encode, encode_chat, hash_blocks, write_answer

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
prompts = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


@given(texts)
def test_decoding_undoes_encoding(text: str) -> None:
    assert decode(encode(text)) == text
    assert len(encode(text)) == -(-len(text.encode()) // 4)


@given(prompts, st.integers(1, 60), st.booleans())
def test_an_answer_cut_anywhere_and_continued_is_the_same_answer(
    prompt: list[int], tokens: int, ignore_eos: bool
) -> None:
    whole, stopped = write_answer(prompt, tokens, ignore_eos=ignore_eos)
    assert (whole, stopped) == write_answer(prompt, tokens, ignore_eos=ignore_eos)
    assert stopped or len(whole) == tokens
    for cut in range(1, len(whole)):
        rest, _ = write_answer(prompt + whole[:cut], tokens - cut, ignore_eos=ignore_eos)
        assert whole[:cut] + rest == whole


def test_answers_end_by_themselves_after_some_sixty_tokens() -> None:
    lengths = [len(write_answer([number], 5000)[0]) for number in range(300)]
    assert 40 < sum(lengths) / len(lengths) < 90
    assert len(write_answer([1], 5000, min_tokens=300)[0]) >= 300


def test_an_answer_given_back_as_history_is_the_tokens_it_was() -> None:
    first = [("system", "Be brief."), ("user", "What is a headrace?")]
    prompt = encode_chat(first)
    answer, _ = write_answer(prompt, 40)
    following = encode_chat([*first, ("assistant", decode(answer)), ("user", "And a penstock?")])
    assert following[: len(prompt) + len(answer)] == prompt + answer


def test_an_open_end_continues_the_last_message() -> None:
    ask = [("user", "Go on")]
    answer, _ = write_answer(encode_chat(ask), 20, ignore_eos=True)
    prompt = encode_chat([*ask, ("assistant", decode(answer[:7]))], open_end=True)
    assert write_answer(prompt, 13, ignore_eos=True)[0] == answer[7:]


@given(prompts, prompts, st.integers(1, 8))
def test_block_hashes_are_shared_exactly_along_the_common_prefix(
    left: list[int], right: list[int], block_size: int
) -> None:
    hashes = hash_blocks(left, block_size), hash_blocks(right, block_size)
    assert len(hashes[0]) == len(left) // block_size
    for index, (a, b) in enumerate(zip(*hashes, strict=False)):
        end = (index + 1) * block_size
        assert (a == b) == (left[:end] == right[:end])


def test_a_salt_separates_caches() -> None:
    assert not set(hash_blocks([1, 2, 3, 4], 2)) & set(hash_blocks([1, 2, 3, 4], 2, "tenant"))
