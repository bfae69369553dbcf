"""Timing profiles: how fast one engine on one machine is and how large, as a file.

    {"name": …, "origin": …, "simulated": {"step_s": …, "prefill_token_s": …, "block_size": …, …}}

`simulated` holds what a configuration's `simulated:` section holds; what it leaves out has that section's
defaults. `headrace calibrate` writes such a file; `headrace simulate --profile` reads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrace.config import SimulatedEngine
from headrace.errors import CallerError

DEFAULT_ENGINE = SimulatedEngine(
    block_size=512,
    num_blocks=2929,
    max_batched_tokens=8192,
    max_running=256,
    max_model_len=262_144,
    step_s=0.008,
    prefill_token_s=1 / 16_000,
    decode_sequence_s=0.000_05,
    context_token_s=0.000_000_02,
)
"""The engine of the policy study: prefills 16,000 tokens/s in chunks of 8,192, which makes a chunk 0.52 s. A decode
step takes 8 ms to read the weights, 50 µs per sequence and 20 ns per token of context: 26 ms at 32 sequences of
25,000 tokens. Of the order of a model of 70 billion parameters, FP8, on four H100s."""


class ProfileError(CallerError):
    """A profile that cannot be read. The message names the file and the key."""


@dataclass(frozen=True, slots=True)
class TimingProfile:
    """An engine to simulate, and where its constants come from."""

    name: str
    origin: str
    engine: SimulatedEngine

    def write(self, path: Path) -> None:
        """Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "origin": self.origin,
            "simulated": self.engine.model_dump(mode="json"),
        }


DEFAULT_PROFILE = TimingProfile("study", "stated, not measured: see DEFAULT_ENGINE", DEFAULT_ENGINE)


def read_profile(path: str | Path) -> TimingProfile:
    """Raises `ProfileError` where the file is missing, no JSON, or says something that cannot be."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"profile {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("simulated"), dict):
        raise ProfileError(f"profile {path} must be a JSON object with an object `simulated`")
    try:
        engine = SimulatedEngine.model_validate(data["simulated"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise ProfileError(f"profile {path}: simulated.{key}: {first['msg']}") from error
    return TimingProfile(str(data.get("name", path.stem)), str(data.get("origin", "")), engine)


def with_cache(engine: SimulatedEngine, cache_tokens: int) -> SimulatedEngine:
    """The same engine with room for `cache_tokens`, whole blocks of them. Raises `CallerError` below one block."""
    num_blocks = cache_tokens // engine.block_size
    if num_blocks < 1:
        raise CallerError(f"a cache of {cache_tokens} tokens holds no block of {engine.block_size}")
    return engine.model_copy(update={"num_blocks": num_blocks})
