"""Request bodies of a given size whose prompts share prefixes, as conversations do."""

from __future__ import annotations

import json
import random

# fmt: off
WORDS = (
    "water", "channel", "turbine", "weir", "sluice", "penstock", "river", "valley", "gate", "rack", "pressure",
    "head", "flow", "basin", "spillway", "canal", "stone", "timber", "winter", "spring", "flood", "drought",
    "keeper", "ledger", "level", "gauge",
)
# fmt: on
SHARED = 0.75  # of a prompt: the part that its family has in common


def text(rng: random.Random, length: int) -> str:
    """`length` characters of words."""
    words: list[str] = []
    size = 0
    while size <= length:  # joining leaves out the last space
        words.append(rng.choice(WORDS))
        size += len(words[-1]) + 1
    return " ".join(words)[:length]


def chat_body(prompt: str, *, stream: bool, max_tokens: int, directive: str = "") -> bytes:
    """A chat request as the openai client sends it."""
    messages = [
        {"role": "system", "content": "You keep the sluice."},
        {"role": "user", "content": directive + prompt},
    ]
    fields = {
        "model": "mock",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def bodies(body_bytes: int, count: int, families: int, seed: int) -> list[bytes]:
    """`count` unstreamed requests of exactly `body_bytes` bytes, in `families` families of shared prefix.

    Raises ValueError when a request cannot be that small.
    """
    rng = random.Random(seed)
    room = body_bytes - len(chat_body("", stream=False, max_tokens=16))
    if room < 16:
        raise ValueError(f"a body of {body_bytes} bytes leaves no room for a prompt; use at least 256")
    heads = [text(rng, int(room * SHARED)) for _ in range(families)]
    prompts = (heads[number % families] for number in range(count))
    return [chat_body(head + text(rng, room - len(head)), stream=False, max_tokens=16) for head in prompts]
