"""Encoding by segments equals encoding whole, for every kind of tokenizer."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from headrace.gateway.segment_cache import SegmentCache, SegmentTokenizer
from headrace.gateway.word_cutter import any_of

TEXT = [
    "The headrace brings water to the turbines, and the tailrace takes it away again.",
    "def water(head: float) -> float:\n    return 9.81 * head\n\n",
    "Die Flüsse führen Wasser; 水は低きに流れる。 🙂🙃",
]
SPECIAL = ["<|start|>", "<|end|>", "<|start|>header", "<s>", "</s>"]
KINDS = ["bytes", "spaces first", "spaces always", "words", "normalised", "greedy"]


@lru_cache
def definition(kind: str) -> str:
    """A small tokenizer.json."""
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    if kind in ("bytes", "greedy", "normalised"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "words":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"])
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        scheme = "first" if kind == "spaces first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(special)
    if kind == "normalised":
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_tokens([AddedToken("WATER", normalized=True)])
    if kind == "greedy":
        tokenizer.add_special_tokens(
            [AddedToken("<mask>", lstrip=True, normalized=False), AddedToken("<one>", single_word=True)]
        )
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    return tokenizer.to_str()


@lru_cache
def whole(kind: str) -> Tokenizer:
    return Tokenizer.from_str(definition(kind))


@lru_cache
def by_segments(kind: str) -> SegmentTokenizer:
    return SegmentTokenizer(definition(kind))


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL, "<mask>", "<one>", "WATER", "water", "<|", "|>", "<", " ", "  ", "\n", "▁"]
        ),
        st.sampled_from(TEXT),
        st.text(max_size=12),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=pieces, framed=st.booleans())
def test_segments_encode_as_the_whole_text_does(kind: str, text: str, framed: bool) -> None:
    ids = by_segments(kind).token_ids(text, add_special_tokens=framed)
    assert ids.tolist() == whole(kind).encode(text, add_special_tokens=framed).ids


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(pieces, max_size=8))
def test_cache_stays_within_its_bound_and_true(kind: str, texts: list[str]) -> None:
    cache = SegmentCache(max_bytes=4096)
    tokenizer = by_segments(kind)
    whole_cache, tokenizer.cache = tokenizer.cache, cache
    try:
        for text in texts:
            assert (
                tokenizer.token_ids(text).tolist() == whole(kind).encode(text, add_special_tokens=False).ids
            )
            cache.check_integrity()
    finally:
        tokenizer.cache = whole_cache


def test_growing_conversation_encodes_only_its_new_turn() -> None:
    tokenizer = SegmentTokenizer(definition("bytes"))
    conversation = ""
    for turn in range(20):
        new = f"<|start|>user {turn}\n{TEXT[0]}<|end|>"
        conversation += new
        plan = tokenizer.plan(conversation)
        assert plan.missing_chars <= len(new)
        tokenizer.finish(plan, tokenizer.encode(plan.missing), add_special_tokens=False)
    assert tokenizer.plan(conversation).missing == []


def test_oldest_segments_make_room() -> None:
    cache = SegmentCache(max_bytes=2000)
    for letter in "abcdef":
        cache.put(letter * 100, bytes(100))
    assert cache.get("a" * 100) is None
    assert cache.get("f" * 100) == bytes(100)
    cache.check_integrity()


def test_ids_are_a_read_only_array() -> None:
    ids = by_segments("bytes").token_ids("water")
    assert ids.dtype == "uint32" and not ids.flags.writeable


def test_random_tokenizer_is_refused() -> None:
    description = json.loads(definition("bytes"))
    description["model"]["dropout"] = 0.1
    with pytest.raises(ValueError, match="draws lots"):
        SegmentTokenizer(json.dumps(description))


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError):
        SegmentTokenizer("{}")


@given(
    words=st.lists(st.text("abc<|", min_size=1, max_size=5), max_size=12),
    text=st.text("abc<| ", max_size=40),
)
def test_cutter_finds_the_leftmost_longest_word(words: list[str], text: str) -> None:
    pattern = any_of(words)
    expected, at = [], 0
    while at < len(text):
        found = max((word for word in words if text.startswith(word, at)), key=len, default="")
        if found:
            expected.append(found)
        at += len(found) or 1
    assert ([] if pattern is None else pattern.findall(text)) == expected


def test_cutter_with_thousands_of_words_is_as_quick_as_with_one() -> None:
    # Counted in steps would be better; a wide margin on time has to do: plain alternatives take over 1 s here.
    from time import perf_counter

    pattern = any_of([f"<unused{number}>" for number in range(6000)] + ["[toxicity]", "\n\n\n"])
    assert pattern is not None
    text = "So it was, < said [he]. \n\n" * 1000
    started_s = perf_counter()
    assert pattern.findall(text) == []
    assert perf_counter() - started_s < 0.5
