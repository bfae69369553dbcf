"""The prefix table's conservation laws, checked by other means than the kernel's own.

entries counted == entries found == num_blocks
every entry is reachable: its segment is the directory's, no empty slot lies between its home and it
segments in use + free segments == segments ever taken; the directory covers each in one aligned span
rows in use == slots that name a row, one to one; a row's count == the bits in its mask
no set is empty, every list is ascending
"""

from __future__ import annotations

import numpy as np

from headrace_kernels import prefix_kernel as kernel
from headrace_kernels.prefix_kernel import Table


def audit(table: Table) -> None:
    """Raise AssertionError naming the first law that does not hold."""
    counters = table.counters
    depth = int(counters[kernel.DEPTH])
    directory = table.directory[: 1 << depth]
    in_use = np.unique(directory)
    free = table.free[: counters[kernel.NUM_FREE]]
    taken = sorted([*in_use.tolist(), *free.tolist()])
    assert taken == list(range(counters[kernel.NUM_SEGMENTS])), (
        "segments in use and free are not all segments"
    )
    assert 0 <= counters[kernel.NUM_RELEASED] <= counters[kernel.NUM_FREE], "more released than free segments"
    rows: list[int] = []
    num_blocks = 0
    for segment in in_use.tolist():
        num_blocks += _audit_segment(table, segment, depth, rows)
    assert num_blocks == counters[kernel.NUM_BLOCKS], (
        f"{num_blocks} entries, counted {counters[kernel.NUM_BLOCKS]}"
    )
    assert num_blocks <= counters[kernel.MAX_BLOCKS], f"{num_blocks} entries exceed max_blocks"
    depths = np.bincount(table.segments[in_use, 1], minlength=25)
    assert (depths == counters[kernel.AT_DEPTH : kernel.AT_DEPTH + 25]).all(), "segments per depth miscounted"
    assert sorted(rows) == list(range(counters[kernel.NUM_ROWS])), "rows and the slots that name them differ"


def _audit_segment(table: Table, segment: int, depth: int, rows: list[int]) -> int:
    """Number of entries; the rows they name are appended to `rows`."""
    local_depth = int(table.segments[segment, 1])
    span = np.flatnonzero(table.directory[: 1 << depth] == segment)
    width = 1 << (depth - local_depth)
    assert span.size == width and span[0] % width == 0 and span[-1] == span[0] + width - 1, (
        f"segment {segment}: the directory's span does not fit its depth {local_depth}"
    )
    words = table.pool[segment * kernel.SEGMENT_WORDS : (segment + 1) * kernel.SEGMENT_WORDS].reshape(-1, 2)
    slots = np.flatnonzero(words[:, 0])
    keys, members = words[slots, 0], words[slots, 1]
    assert slots.size == table.segments[segment, 0], (
        f"segment {segment}: {slots.size} entries, counted otherwise"
    )
    assert slots.size <= kernel.MAX_FILL, f"segment {segment} is overfull"
    assert np.unique(keys).size == keys.size, f"segment {segment} holds a hash twice"
    prefixes = keys >> np.uint64(64 - local_depth)
    assert (prefixes == span[0] // width).all(), f"segment {segment} holds a hash of another"
    home = (keys >> np.uint64(28)).astype(np.int64) & (kernel.SLOTS - 1)
    gaps = np.concatenate([[0], np.cumsum(words[:, 0] == 0)])  # empty slots before slot i
    around = np.where(home <= slots, gaps[slots] - gaps[home], gaps[-1] - gaps[home] + gaps[slots])
    assert (around == 0).all(), f"segment {segment}: an empty slot cuts an entry off from its home"
    assert (members != 0).all(), f"segment {segment} holds an entry of no replica"
    tags = members >> np.uint64(62)
    assert (tags < 3).all(), f"segment {segment}: unknown form of members"
    names = members[tags == 1, None] >> (np.arange(5, dtype=np.uint64) * np.uint64(12)) & np.uint64(0xFFF)
    ascending = (names[:, 1:] == 0) | ((names[:, :-1] > 0) & (names[:, :-1] < names[:, 1:]))
    assert ascending.all() and (names[:, 0] > 0).all(), f"segment {segment}: a list is not ascending"
    for key, row in zip(
        keys[tags == 2].tolist(), (members[tags == 2] ^ np.uint64(2 << 62)).tolist(), strict=True
    ):
        size = table.alive.size + kernel.ROW_HEAD
        words_of_row = table.rows[row * size : (row + 1) * size].tolist()
        assert words_of_row[0] == key, f"row {row} belongs to another hash than the slot that names it"
        count = sum(word.bit_count() for word in words_of_row[kernel.ROW_HEAD :])
        assert words_of_row[1] == count > 0, f"row {row} holds {count} columns, counted {words_of_row[1]}"
        rows.append(row)
    return int(slots.size)
