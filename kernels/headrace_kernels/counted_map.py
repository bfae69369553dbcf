"""A map from 64-bit keys to 64-bit values in which a key may be present several times.

Made for an engine's block hashes: it announces each copy of a block and the removal of each copy, and what it calls
the block is not what we call it. 18 bytes per slot, slots between 40% and 80% full: 23 to 45 bytes per key, against
some 130 of a dict of ints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.compilation import compiled

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SMALLEST = 64
MOST_COPIES = 65535  # counted; further copies are not


class Slots(NamedTuple):
    """Open addressing with linear probing; a slot whose `copies` is 0 is empty."""

    keys: NDArray[np.uint64]
    values: NDArray[np.uint64]
    copies: NDArray[np.uint16]


class CountedMap:
    """Mutable, not thread-safe. All arrays given are uint64 and C-contiguous."""

    def __init__(self, expected: int = 0) -> None:
        """`expected` keys fit without growing."""
        self._length = 0
        self._slots = _new_slots(_capacity_for(expected))

    def __len__(self) -> int:
        """Distinct keys."""
        return self._length

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> int:
        """One more copy of each key; a new key takes its value, a known one keeps the one it has. How many were new.
        Growing copies the whole map, about 15 ns per key. Raises ValueError when the lengths differ."""
        if keys.size != values.size:
            raise ValueError(f"{keys.size} keys but {values.size} values")
        keys, values = _frozen(keys), _frozen(values)
        capacity = _capacity_for(self._length + keys.size)
        if capacity > self._slots.keys.size:
            grown = _new_slots(capacity)
            move_all(self._slots, grown)
            self._slots = grown
        added = int(add_copies(self._slots, keys, values))
        self._length += added
        return added

    def drop(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One copy less of each key. The values of those of which none is left; unknown keys are passed over."""
        gone = np.empty(keys.size, np.uint64)
        count = int(drop_copies(self._slots, _frozen(keys), gone))
        self._length -= count
        return gone[:count]

    def get(self, key: int) -> int | None:
        """The value of a key."""
        at = int(find(self._slots, np.uint64(key)))
        return None if at < 0 else int(self._slots.values[at])

    def values(self) -> NDArray[np.uint64]:
        """A copy of the values, one per distinct key, in no order."""
        return self._slots.values[self._slots.copies > 0]

    @property
    def memory_bytes(self) -> int:
        return sum(part.nbytes for part in self._slots)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every key is found where probing looks for it."""
        used = np.flatnonzero(self._slots.copies)
        assert used.size == self._length, f"{used.size} slots in use, {self._length} keys"
        for at in used:
            key = self._slots.keys[at]
            assert find(self._slots, key) == at, f"key {int(key)} is not found in slot {at}"


class CountedMapReference:
    """The same as a dict."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, keys: Iterable[int], values: Iterable[int]) -> int:
        before = len(self._entries)
        for key, value in zip(keys, values, strict=True):
            known, copies = self._entries.get(key, (value, 0))
            self._entries[key] = (known, copies + 1)
        return len(self._entries) - before

    def drop(self, keys: Iterable[int]) -> list[int]:
        gone = []
        for key in keys:
            if key in self._entries:
                value, copies = self._entries.pop(key)
                if copies > 1:
                    self._entries[key] = (value, copies - 1)
                else:
                    gone.append(value)
        return gone

    def get(self, key: int) -> int | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]


def _frozen(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The one layout that the kernels are compiled for."""
    view = np.ascontiguousarray(words, np.uint64).view()
    view.flags.writeable = False
    return view


def _capacity_for(length: int) -> int:
    """The smallest power of two that `length` keys fill to at most 80%."""
    return max(_SMALLEST, 1 << (length * 5 // 4).bit_length())


def _new_slots(capacity: int) -> Slots:
    return Slots(np.zeros(capacity, np.uint64), np.zeros(capacity, np.uint64), np.zeros(capacity, np.uint16))


@compiled
def _home(slots: Slots, key: np.uint64) -> int:
    scrambled = key * _MIX
    return np.int64((scrambled ^ (scrambled >> np.uint64(32))) & np.uint64(slots.keys.size - 1))  # type: ignore[return-value]


@compiled
def _probe(slots: Slots, key: np.uint64) -> int:
    """The key's slot, or the empty one where it would go."""
    at = _home(slots, key)
    while slots.copies[at] != 0 and slots.keys[at] != key:
        at = (at + 1) & (slots.keys.size - 1)
    return at


@compiled
def find(slots: Slots, key: np.uint64) -> int:
    """The key's slot, -1 when it is not there."""
    at = _probe(slots, key)
    return at if slots.copies[at] != 0 else -1


@compiled
def add_copies(slots: Slots, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> int:
    """See `CountedMap.add`. There is room."""
    added = 0
    for index in range(keys.size):
        at = _probe(slots, keys[index])
        if slots.copies[at] == 0:
            slots.keys[at] = keys[index]
            slots.values[at] = values[index]
            slots.copies[at] = 1
            added += 1
        elif slots.copies[at] < MOST_COPIES:
            slots.copies[at] += 1
    return added


@compiled
def drop_copies(slots: Slots, keys: NDArray[np.uint64], gone: NDArray[np.uint64]) -> int:
    """See `CountedMap.drop`; fills `gone`. The slots behind an emptied one move up (Knuth, 6.4, algorithm R), so
    that no tombstones are left."""
    mask = slots.keys.size - 1
    count = 0
    for index in range(keys.size):
        at = _probe(slots, keys[index])
        if slots.copies[at] == 0:
            continue
        if slots.copies[at] > 1:
            slots.copies[at] -= 1
            continue
        gone[count] = slots.values[at]
        count += 1
        slots.copies[at] = 0
        following = (at + 1) & mask
        while slots.copies[following] != 0:
            home = _home(slots, slots.keys[following])
            if ((following - home) & mask) >= ((following - at) & mask):
                slots.keys[at] = slots.keys[following]
                slots.values[at] = slots.values[following]
                slots.copies[at] = slots.copies[following]
                slots.copies[following] = 0
                at = following
            following = (following + 1) & mask
    return count


@compiled
def move_all(slots: Slots, target: Slots) -> None:
    """Put every entry of `slots` into the empty `target`."""
    for at in range(slots.keys.size):
        if slots.copies[at] != 0:
            to = _probe(target, slots.keys[at])
            target.keys[to] = slots.keys[at]
            target.values[to] = slots.values[at]
            target.copies[to] = slots.copies[at]
