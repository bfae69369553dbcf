"""Text → token ids, remembered by segment: a growing conversation pays only for its new turn.

A tokenizer first cuts text at its added tokens (`<|im_start|>` and its kind) and then treats every piece for itself,
so pieces can be encoded apart and kept. That holds for added tokens that are matched in the text as it stands; the
others (normalised first, or taking the spaces around them along) are left for the tokenizer to cut inside a piece, and
a text that holds one of the latter is encoded whole.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.gateway.word_cutter import any_of

TokenIds = NDArray[np.uint32]

# What an entry takes besides its text and its ids: the dict's slot, both objects' heads, the linked list's node.
ENTRY_BYTES = 280


class SegmentCache:
    """Least-recently-used segments within a bound in bytes. Not thread-safe: one event loop owns it."""

    def __init__(self, max_bytes: int = 64 * 1024 * 1024) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, segment: str) -> bytes | None:
        """The segment's ids as 32-bit words, None where they are not known."""
        ids = self._entries.get(segment)
        if ids is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(segment)
        return ids

    def put(self, segment: str, ids: bytes) -> None:
        """Remember; the oldest go when space is short. A segment over a quarter of the whole is not kept."""
        size = _entry_bytes(segment, ids)
        if size > self.max_bytes // 4 or segment in self._entries:
            return
        self._entries[segment] = ids
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _entry_bytes(*self._entries.popitem(last=False))

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes add up and stay within the bound."""
        assert self.num_bytes == sum(_entry_bytes(*entry) for entry in self._entries.items())
        assert self.num_bytes <= self.max_bytes


def _entry_bytes(segment: str, ids: bytes) -> int:
    # One, two or four bytes a character, by the widest; isascii() is constant time and covers most text.
    width = 1 if segment.isascii() else 4
    return len(segment) * width + len(ids) + ENTRY_BYTES


class Plan(NamedTuple):
    """A text cut into segments: ids where they are known, and what is still to be encoded."""

    parts: list[bytes | None]  # 32-bit ids of every segment in order, None where they are missing
    missing: list[str]  # the segments behind the Nones, in order
    missing_chars: int


class SegmentTokenizer:
    """A `tokenizer.json`, by segments. `plan` and `finish` belong to one thread; `encode` may run in any."""

    def __init__(self, definition: bytes | str, cache: SegmentCache | None = None) -> None:
        """`definition` is the text of a tokenizer.json. Raises ValueError when it is none or is random (dropout)."""
        from tokenizers import Tokenizer

        text = definition.decode() if isinstance(definition, bytes) else definition
        description = json.loads(text)
        if (description.get("model") or {}).get("dropout"):
            raise ValueError("the tokenizer draws lots (BPE dropout): its tokens cannot be foretold")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.cache = SegmentCache() if cache is None else cache
        added = [token for token in description.get("added_tokens") or [] if token["content"]]
        plain = {token["content"]: token["id"] for token in added if _is_plain(token)}
        self._fixed = {content: array("I", [token_id]).tobytes() for content, token_id in plain.items()}
        self._cut = any_of(plain, kept=True)
        self._uncuttable = any_of(
            token["content"] for token in added if not token["normalized"] and not _is_plain(token)
        )
        # Some tokenizers treat a text's first piece unlike the rest: the rest is then encoded behind a lead.
        self._lead = ""
        if _minds_position(description.get("pre_tokenizer")):
            self._lead = _lead(list(plain), [token["content"] for token in added])
            if not self._lead:
                self._cut = None
        self._prefix, self._suffix = self._framing()

    def plan(self, text: str) -> Plan:
        """Cut and look up; takes about 1 µs per segment and 1 µs per 3 KB."""
        parts: list[bytes | None] = []
        missing: list[str] = []
        num_missing_chars = 0
        for segment in self._segments(text):
            ids = self._fixed.get(segment)
            if ids is None:
                ids = self.cache.get(segment)  # also of "\n": encoding it takes 5 µs, finding it 0.1
            if ids is None:
                missing.append(segment)
                num_missing_chars += len(segment)
            parts.append(ids)
        return Plan(parts, missing, num_missing_chars)

    def encode(self, segments: list[str]) -> list[bytes]:
        """Token ids of segments that `plan` found missing. Pure; releases the GIL while it encodes."""
        return [self._encode_one(segment) for segment in segments]

    def finish(self, plan: Plan, encoded: list[bytes], *, add_special_tokens: bool) -> TokenIds:
        """The ids of the whole text, read-only; what was encoded is remembered."""
        for segment, ids in zip(plan.missing, encoded, strict=True):
            self.cache.put(segment, ids)
        new = iter(encoded)
        parts = [next(new) if part is None else part for part in plan.parts]
        if add_special_tokens:
            parts = [self._prefix, *parts, self._suffix]
        return np.frombuffer(b"".join(parts), np.uint32)

    def token_ids(self, text: str, *, add_special_tokens: bool = False) -> TokenIds:
        """All three steps at once, in this thread."""
        plan = self.plan(text)
        return self.finish(plan, self.encode(plan.missing), add_special_tokens=add_special_tokens)

    def _segments(self, text: str) -> list[str]:
        """Pieces and the tokens between them; with a lead, where a piece's place matters and it is not the first."""
        if self._cut is None or (self._uncuttable is not None and self._uncuttable.search(text) is not None):
            return [text] if text else []
        segments = self._cut.split(text)
        if self._lead:
            segments[2::2] = [self._lead + segment if segment else "" for segment in segments[2::2]]
        return [segment for segment in segments if segment]

    def _encode_one(self, segment: str) -> bytes:
        packed = array("I", self._tokenizer.encode(segment, add_special_tokens=False).ids).tobytes()
        if not self._lead or not segment.startswith(self._lead):
            return packed
        # No piece starts with an added token, so the lead is ours to take off; a text left uncut may start with one.
        uncut = self._uncuttable is not None and self._uncuttable.search(segment) is not None
        return packed if uncut else packed[4:]

    def _framing(self) -> tuple[bytes, bytes]:
        """What the post-processor puts around a text (`<s>`, `[SEP]`). Raises ValueError where it does more."""
        frames = set()
        for probe in ("a", "Two words, and more"):
            bare = self._tokenizer.encode(probe, add_special_tokens=False).ids
            framed = self._tokenizer.encode(probe, add_special_tokens=True).ids
            at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
            if at is None:
                raise ValueError("the tokenizer changes text when special tokens are added")
            frames.add((tuple(framed[:at]), tuple(framed[at + len(bare) :])))
        if len(frames) != 1:
            raise ValueError("the tokenizer's special tokens depend on the text")
        prefix, suffix = frames.pop()
        return array("I", prefix).tobytes(), array("I", suffix).tobytes()


def _is_plain(token: dict[str, Any]) -> bool:
    """Matched in the text as it stands, taking nothing along."""
    return bool(token["content"]) and not any(
        token.get(flag) for flag in ("normalized", "single_word", "lstrip", "rstrip")
    )


def _lead(candidates: list[str], added: list[str]) -> str:
    """An added token to stand before a piece: one that no other can begin in or continue, lest both run together."""
    for lead in candidates:
        ends = [lead[-length:] for length in range(1, len(lead) + 1)]
        if not any(other.startswith(end) for other in added if other != lead for end in ends):
            return lead
    return ""


def _minds_position(component: Any) -> bool:
    """Metaspace with prepend_scheme `first` marks only a text's first piece."""
    if isinstance(component, dict):
        if component.get("type") == "Metaspace":
            return bool(component.get("prepend_scheme", "always") == "first")
        return any(_minds_position(value) for value in component.values())
    return isinstance(component, list) and any(map(_minds_position, component))
