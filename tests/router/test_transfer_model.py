"""The time of a hand-over is learned from a few, survives stalls, and is never absurd."""

from __future__ import annotations

from math import isfinite
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_router.transfer_model import TransferModel
from headrace_router.types import Transfer


class Link:
    """Draws transfers over a link with known constants."""

    def __init__(self, seed: int, faster: float, noise: float = 0.1) -> None:
        """`faster` than the prior by this factor."""
        prior = TransferModel()
        self.rng = Random(seed)
        self.latency_s, self.token_s = prior.latency_s / faster, prior.token_s / faster
        self.noise = noise

    def duration_s(self, tokens: int) -> float:
        return self.latency_s + self.token_s * tokens

    def transfer(self) -> Transfer:
        tokens = self.rng.randint(200, 30_000)
        return Transfer(tokens, self.duration_s(tokens) * max(0.3, self.rng.gauss(1, self.noise)))


@pytest.mark.parametrize("faster", [0.02, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_bandwidth_is_known_within_twenty_transfers(faster: float, seed: int) -> None:
    link, model = Link(seed, faster), TransferModel()
    model.observe(link.transfer() for _ in range(20))
    assert model.duration_s(15_000) == pytest.approx(link.duration_s(15_000), rel=0.25)


def test_small_transfers_teach_the_latency_and_large_ones_the_bandwidth() -> None:
    model = TransferModel()
    for _ in range(60):
        model.observe((Transfer(10, 0.1001), Transfer(100_000, 0.2)))
    assert model.duration_s(10) == pytest.approx(0.1, rel=0.1)
    assert model.duration_s(100_000) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_stalled_transfer_moves_little(seed: int) -> None:
    link, model = Link(seed, 2.0), TransferModel()
    for number in range(60):
        model.observe((link.transfer(),))
        if number % 10 == 9:
            model.observe((Transfer(3000, 20.0),))
    assert model.duration_s(15_000) == pytest.approx(link.duration_s(15_000), rel=0.5)


def test_a_lasting_change_is_followed() -> None:
    model, before, after = TransferModel(), Link(1, 2.0), Link(2, 0.2)
    model.observe(before.transfer() for _ in range(50))
    model.observe(after.transfer() for _ in range(40))
    assert model.duration_s(15_000) == pytest.approx(after.duration_s(15_000), rel=0.3)


def test_nothing_to_move_takes_no_time() -> None:
    assert TransferModel().duration_s(0) == 0.0


@given(
    transfers=st.lists(
        st.builds(
            Transfer,
            st.integers(-1, 2**40),
            st.floats(allow_nan=True, allow_infinity=True) | st.floats(1e-12, 1e6),
        ),
        max_size=80,
    ),
    tokens=st.integers(1, 2**40),
)
def test_no_observation_makes_a_time_zero_or_infinite(transfers: list[Transfer], tokens: int) -> None:
    model = TransferModel()
    model.observe(transfers)
    assert isfinite(model.duration_s(tokens))
    assert 0 < model.duration_s(tokens) <= 60
