"""The map equals its reference, whatever is added and dropped."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_kernels.counted_map import CountedMap, CountedMapReference

# Few keys, so that they meet again; some of them share their low bits.
KEYS = st.lists(st.integers(0, 40).map(lambda key: key * 0x9E3779B97F4A7C15 % 2**64), max_size=60)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), KEYS), max_size=20))
def test_map_equals_its_reference(steps: list[tuple[bool, list[int]]]) -> None:
    ours, plain = CountedMap(), CountedMapReference()
    for adds, keys in steps:
        words = np.array(keys, np.uint64)
        if adds:
            values = [key ^ 5 for key in keys]
            assert ours.add(words, np.array(values, np.uint64)) == plain.add(keys, values)
        else:
            assert ours.drop(words).tolist() == plain.drop(keys)
        assert len(ours) == len(plain)
        assert all(ours.get(key) == plain.get(key) for key in keys)
    ours.check_integrity()
    assert len(ours.values()) == len(plain)


def test_churn_leaves_no_slot_lost_and_memory_within_its_bound() -> None:
    rng = np.random.default_rng(7)
    copies = CountedMap()
    keys = rng.integers(0, 2**64, 50_000, np.uint64)
    for start in range(0, 50_000, 500):
        copies.add(keys[start : start + 500], keys[start : start + 500])
        if start >= 10_000:
            gone = copies.drop(keys[start - 10_000 : start - 9_500])
            assert gone.size == 500
    assert len(copies) == 10_000
    copies.check_integrity()
    assert copies.memory_bytes / len(copies) < 46


def test_memory_per_key_is_as_stated() -> None:
    keys = np.arange(1, 100_001, dtype=np.uint64)
    copies = CountedMap()
    for start in range(0, 100_000, 100):
        copies.add(keys[start : start + 100], keys[start : start + 100])
        if start > 1000:
            assert 22 < copies.memory_bytes / len(copies) < 46
