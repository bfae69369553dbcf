"""Constants of the timing model are found again from the steps they made."""

from __future__ import annotations

import random

import pytest

from headrace.backends.timing_model import TimingModel, fit_timing
from headrace_router.types import Iteration

TRUE = TimingModel(step_s=0.005, prefill_token_s=6e-5, decode_sequence_s=2e-4, context_token_s=3e-8)


def steps(model: TimingModel, count: int, noise: float, seed: int = 7) -> list[Iteration]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        load = (draw.choice([0, 0, draw.randrange(2048)]), draw.randrange(64), draw.randrange(200_000))
        made.append(Iteration(model.duration_s(*load) * draw.gauss(1, noise), *load))
    return made


def test_exact_steps_give_the_exact_constants() -> None:
    found = fit_timing(steps(TRUE, 50, noise=0.0))
    assert found.step_s == pytest.approx(TRUE.step_s)
    assert found.prefill_token_s == pytest.approx(TRUE.prefill_token_s)
    assert found.decode_sequence_s == pytest.approx(TRUE.decode_sequence_s)
    assert found.context_token_s == pytest.approx(TRUE.context_token_s)


def test_noisy_steps_predict_within_a_few_percent() -> None:
    found = fit_timing(steps(TRUE, 2000, noise=0.1))
    for load in ((2048, 0, 0), (0, 32, 100_000), (512, 16, 50_000)):
        assert found.duration_s(*load) == pytest.approx(TRUE.duration_s(*load), rel=0.05)


def test_constants_are_never_negative() -> None:
    shrinking = [Iteration(1.0 - tokens / 1000, tokens, 1) for tokens in range(100)]
    found = fit_timing(shrinking)
    assert min(found.step_s, found.prefill_token_s, found.decode_sequence_s, found.context_token_s) >= 0


def test_what_never_varied_is_left_at_zero() -> None:
    found = fit_timing([Iteration(0.01 + 1e-5 * tokens, tokens, 0) for tokens in range(20)])
    assert (found.decode_sequence_s, found.context_token_s) == (0.0, 0.0)
    assert found.step_s == pytest.approx(0.01)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        fit_timing(steps(TRUE, 7, noise=0.0))
