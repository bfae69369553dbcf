"""The toy language of the simulated engine: a tokenizer without a vocabulary and a writer without a model.

A token is four bytes of text read as a big-endian number, so any text can be encoded and decoded; the last
token of a text is padded with zero bytes, which decoding drops (text that holds zero bytes loses them).
Every answer token is a space and three ASCII characters. Messages are encoded one by one, so an answer that
comes back as history is the very tokens it was.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import product

TOKEN_BYTES = 4
MAX_TOKEN_ID = 2**32 - 1

_PRIME = (1 << 61) - 1
_MASK = (1 << 64) - 1


def _number(word: str) -> int:
    return int.from_bytes(word.encode(), "big")


_WORDS = [f" {a}{b}{c}" for a, b, c in product("bdfklmnrst", "aeiou", "bdlnrst")][:224]
_ENDINGS = [f" {a}{b}." for a, b in product("bdfklmnrst", "aeiou")][:32]
_VOCABULARY = [_number(word) for word in _WORDS + _ENDINGS]
_SENTENCE_ENDS = frozenset(_number(word) for word in _ENDINGS)


def encode(text: str) -> list[int]:
    """Token ids of `text`, one per four bytes of its UTF-8."""
    data = text.encode("utf-8", "replace")
    return _unpack(data + b"\0" * (-len(data) % TOKEN_BYTES))


def decode(tokens: Sequence[int]) -> str:
    """The text of `tokens`; bytes that are not UTF-8 become U+FFFD. Raises OverflowError above 2**32 - 1."""
    return _pack(tokens).replace(b"\0", b"").decode("utf-8", "replace")


def encode_chat(messages: Iterable[tuple[str, str]], *, open_end: bool = False) -> list[int]:
    """Token ids of (role, content) messages and of the header that asks for an answer.

    With `open_end` the last message is left unfinished instead, and the answer continues it.
    """
    tokens: list[int] = []
    end = encode("<|/|>\n")
    for role, content in messages:
        tokens += encode(f"<|{role}|>") + encode(content) + end
    return tokens[: -len(end)] if open_end else tokens + encode("<|assistant|>")


def write_answer(
    prompt: Sequence[int], max_tokens: int, *, min_tokens: int = 0, ignore_eos: bool = False
) -> tuple[list[int], bool]:
    """At most `max_tokens` answer tokens and whether the answer ended by itself (after 64 tokens on average).

    Each token depends on every token before it and on nothing else, as in greedy decoding: the same prompt
    gives the same answer, and a prompt with the first part of its answer appended gives the rest of it.
    """
    # The prompt is one large number; modulo a prime that is a polynomial hash, extended by a token in O(1).
    state = int.from_bytes(_pack(prompt), "big") % _PRIME
    last = prompt[-1]
    answer: list[int] = []
    while len(answer) < max_tokens:
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK  # the finaliser of splitmix64, shortened
        mixed ^= mixed >> 27
        may_end = not ignore_eos and len(answer) >= max(min_tokens, 1)
        if may_end and last in _SENTENCE_ENDS and mixed >> 40 & 7 == 0:
            return answer, True
        last = _VOCABULARY[mixed & 255]
        answer.append(last)
        state = ((state << 32) + last) % _PRIME
    return answer, False


def hash_blocks(tokens: Sequence[int], block_size: int, salt: str = "") -> list[int]:
    """64-bit hashes of the full blocks of `tokens`, each over its parent's hash and its own tokens."""
    packed = _pack(tokens)
    parent = hashlib.blake2b(salt.encode("utf-8", "replace"), digest_size=8).digest()
    width = block_size * TOKEN_BYTES
    hashes: list[int] = []
    for start in range(0, len(packed) - width + 1, width):
        parent = hashlib.blake2b(parent + packed[start : start + width], digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "big"))
    return hashes


def _pack(tokens: Sequence[int]) -> bytes:
    numbers = array("I", tokens)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _unpack(data: bytes) -> list[int]:
    numbers = array("I", data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tolist()
