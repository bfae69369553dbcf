"""A replica's pace is learned quickly, from noisy steps, and is never absurd."""

from __future__ import annotations

from math import isfinite
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_router.cost_model import CostModel, TimingPrior
from headrace_router.types import Iteration


class Engine:
    """Draws steps of an engine with known constants."""

    def __init__(self, seed: int, faster: float, noise: float = 0.05) -> None:
        """`faster` than the default prior by this factor."""
        prior = TimingPrior()
        self.rng = Random(seed)
        self.step_s = prior.step_s / faster
        self.prefill_token_s = prior.prefill_token_s / faster
        self.decode_sequence_s = prior.decode_sequence_s / faster
        self.noise = noise

    def duration_s(self, prefill_tokens: int, sequences: int) -> float:
        return self.step_s + self.prefill_token_s * prefill_tokens + self.decode_sequence_s * sequences

    def prefill(self) -> Iteration:
        tokens, sequences = self.rng.randint(100, 2048), self.rng.randint(0, 30)
        jitter = self.rng.gauss(1, self.noise)
        return Iteration(self.duration_s(tokens, sequences) * max(0.1, jitter), tokens, sequences)

    def decode(self) -> Iteration:
        sequences = self.rng.randint(1, 30)
        return Iteration(
            self.duration_s(0, sequences) * max(0.1, self.rng.gauss(1, self.noise)), 0, sequences
        )

    def request(self) -> list[Iteration]:
        """The steps that one request brings: its prefill and a few of decoding."""
        return [self.prefill(), *(self.decode() for _ in range(3))]


@pytest.mark.parametrize("faster", [0.05, 0.3, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("seed", range(8))
def test_pace_is_known_within_twenty_requests(faster: float, seed: int) -> None:
    engine, model = Engine(seed, faster), CostModel()
    for _ in range(20):
        model.observe(engine.request())
    for tokens, sequences in ((1024, 0), (2048, 20), (512, 5)):
        assert model.duration_s(tokens, sequences) == pytest.approx(
            engine.duration_s(tokens, sequences), rel=0.15
        )
    assert model.seconds_per_token() == pytest.approx(engine.duration_s(2048, 0) / 2048, rel=0.15)


@pytest.mark.parametrize("seed", range(8))
def test_stalled_steps_are_survived_even_as_the_first_ones(seed: int) -> None:
    engine, model = Engine(seed, 2.0), CostModel()
    model.observe([Iteration(10.0, 500, 0), Iteration(30.0, 1, 3)])
    for number in range(60):
        model.observe(engine.request())
        if number % 8 == 7:
            model.observe([Iteration(8.0, 300, 2)])
    assert model.duration_s(1024, 10) == pytest.approx(engine.duration_s(1024, 10), rel=0.2)


def test_long_decoding_does_not_forget_what_a_prompt_costs() -> None:
    engine, model = Engine(1, 3.0), CostModel()
    for _ in range(30):
        model.observe(engine.request())
    for _ in range(20_000):
        model.observe([engine.decode()])
    assert model.duration_s(1024, 0) == pytest.approx(engine.duration_s(1024, 0), rel=0.2)


def test_lasting_change_is_followed() -> None:
    model, before, after = CostModel(), Engine(1, 2.0), Engine(2, 0.5)
    for _ in range(100):
        model.observe(before.request())
    for _ in range(40):
        model.observe(after.request())
    assert model.duration_s(1024, 10) == pytest.approx(after.duration_s(1024, 10), rel=0.2)


STEPS = st.builds(
    Iteration,
    st.floats(allow_nan=True, allow_infinity=True) | st.floats(1e-9, 100),
    st.integers(-1, 2**31),
    st.integers(-1, 2**20),
    st.integers(-1, 2**40),
)


@settings(deadline=None)
@given(steps=st.lists(STEPS, max_size=60), running=st.integers(0, 10_000), context=st.floats(0, 1e12))
def test_no_observation_makes_a_rate_zero_or_infinite(
    steps: list[Iteration], running: int, context: float
) -> None:
    model = CostModel()
    model.observe(steps)
    assert 0 < model.seconds_per_token(running, context) <= 1
    assert isfinite(model.prefill_rate)
    assert model.prefill_rate >= 1
    assert 0 < model.duration_s(running, running, int(context)) <= 600
