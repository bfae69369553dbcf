"""Prompt text made of common words: equal keys give equal text, and its length in tokens can be foretold.

Every word is one token, leading space included, in SmolLM2's vocabulary, and common enough to be so in most
byte-pair vocabularies. Cutting between words then cuts between tokens: a text that begins like another begins
with the same tokens. What a word really costs is measured on the served model (`Calibration`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

_VOCABULARY = (
    "the of and to in is that for it as was with be by on not he his but at are this have had from or one "
    "which you all were her she there would their we him been has when who will more no if out so said what "
    "up its about into than them can only other new some could time these two may then do first any my now "
    "such like our over man me even most made after also did many before must through back years where much "
    "your way well down should because each just those people how too little state good very make world "
    "still own see men work long get here between both life being under never day same another know while "
    "last might us great old year off come since against go came right used take three states himself few "
    "house use during without again place around however home small found thought went say part once "
    "general high upon school every does got united left number course war until always away something fact "
    "water though public less put think almost hand enough far took head yet government system better set "
    "told nothing night end why called find going look asked later knew point next city business give group "
    "young let room within days given order second several early keep case least side mind body car sea "
    "family story white book words money light real face power change door line name best whole hours "
    "question open form turn feel "
)
WORDS = tuple(" " + word for word in _VOCABULARY.split())
assert len(set(WORDS)) == 256, "a byte of digest names a word"


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text, told by its key: two passages of one key are equal up to the shorter's end."""

    key: str
    words: int


@lru_cache(maxsize=4096)
def _words(seed: int, key: str, words: int) -> str:
    # An extendable-output hash: the digest of n bytes begins the digest of n+1, and a byte names a word. The
    # text is the same on every machine and Python, which `random` does not promise.
    digest = hashlib.shake_128(f"{seed}/{key}".encode()).digest(words)
    return "".join(map(WORDS.__getitem__, digest))


def render(seed: int, passages: tuple[Passage, ...]) -> str:
    """The text of `passages`, one after another. Every word brings its leading space."""
    return "".join(_words(seed, passage.key, passage.words) for passage in passages)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tokens of a prompt of `words` words: `overhead_tokens + words * tokens_per_word`, and what messages add.

    `source` says where that comes from: "tokenize" (the server's /tokenize), "usage" (a few tiny requests) or
    "assumed" (the server tells neither; one token per word).
    """

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0  # chat template around one user message, begin-of-text
    system_tokens: float = 0.0  # added by a system message; below 0 where it replaces the template's own
    turn_tokens: float = 0.0  # added by each further pair of messages, an answer and a question
    source: str = "assumed"

    @classmethod
    def fit(cls, words_a: int, tokens_a: int, words_b: int, tokens_b: int, source: str) -> Calibration:
        """The line through two measured prompts; a server whose counts make no sense is not believed."""
        slope = (tokens_b - tokens_a) / (words_b - words_a)
        if not 0.05 <= slope <= 50:
            return cls()
        return cls(slope, max(0.0, tokens_a - slope * words_a), source=source)

    def words_for(self, tokens: float, *, with_overhead: bool = True) -> int:
        """Words that make about `tokens` tokens, at least one."""
        overhead = self.overhead_tokens if with_overhead else 0.0
        return max(1, round((tokens - overhead) / self.tokens_per_word))

    def tokens_of(self, words: int, *, with_overhead: bool = True) -> int:
        """Tokens that `words` words are expected to make."""
        return round(words * self.tokens_per_word + (self.overhead_tokens if with_overhead else 0.0))
