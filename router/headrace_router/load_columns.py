"""The loads of one model's candidates as arrays, for fleets where a loop in Python would be the decision's cost.

Each load writes its own row when it changes (`array` takes a float in a third of numpy's time); numpy reads the same
memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class LoadColumns:
    """One row per candidate, in the order of `View.loads`. `ReplicaLoad` says what the columns mean."""

    __slots__ = ("_buffers", "memory_token_s", "queued", "requests", "room_tokens", "token_s", "turn_s")

    def __init__(self, count: int) -> None:
        self._buffers = tuple(array("d", bytes(8 * count)) for _ in range(6))
        (
            self.turn_s,
            self.token_s,
            self.requests,
            self.queued,
            self.room_tokens,
            self.memory_token_s,
        ) = (_view(buffer) for buffer in self._buffers)

    def write(self, row: int, values: Sequence[float]) -> None:
        """Set one candidate's row: turn_s, token_s, requests, queued, room_tokens, memory_token_s."""
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer[row] = value


def _view(buffer: array[float]) -> NDArray[np.float64]:
    view = np.frombuffer(buffer, np.float64)
    view.flags.writeable = False
    return view
