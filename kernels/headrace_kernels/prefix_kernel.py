"""The prefix table's machine code: an extendible hash table of block hash → set of columns.

A *column* stands for one replica between two clears. The table is cut into *segments* of SLOTS slots, found
through a directory by the hash's top bits (Fagin et al., "Extendible hashing", 1979); inside a segment, linear
probing with backward-shift deletion, so no tombstone ever remains. Growing splits one segment, shrinking merges
two: no call moves more than SLOTS entries at once, however large the table is.

A slot is two words, the scrambled hash and its *members*, the set of columns in one of three forms by its top
two bits:

    00  a bit mask of columns 0..61: all there is in a fleet of up to 62 replicas
    01  a list of up to 5 columns, ascending, 12 bits each, stored plus one
    10  the index of a row in `rows`: [the slot's hash, count, mask words...]

Consecutive blocks of a prompt mostly lie on the same replicas, and then have equal members: a lookup only works
where the members change, so its time hardly depends on the number of replicas.

Loops stand where slices would do: numba compiles them several times faster.
Functions without an underscore are called from Python; the others are inlined into them. All of them live in
this one file for the reason given in `compilation`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from headrace_kernels.compilation import compiled

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
SEGMENT_WORDS = 2 * SLOTS  # 64 KiB, whole pages
MAX_FILL = SLOTS * 7 // 8  # split above it
MERGE_FILL = SLOTS * 3 // 8  # merge two segments that together hold no more
MIN_DEPTH = 1
MASK_COLUMNS = 62
LIST_COLUMNS = 5
MAX_COLUMNS = 4095  # what 12 bits, stored plus one, can name
FETCH_AHEAD = 16  # hashes; a table beyond the processor's cache is bound by latency, not by work
ROW_HEAD = 2  # words before a row's mask

# Indices into Table.counters. From AT_DEPTH on: the number of segments at each depth.
DEPTH, NUM_SEGMENTS, NUM_FREE, NUM_RELEASED, NUM_BLOCKS, NUM_ROWS, MAX_BLOCKS, AT_DEPTH = range(8)

_SLOT_MASK = SLOTS - 1
_0, _1, _2 = np.uint64(0), np.uint64(1), np.uint64(2)
_UNSEEN = np.uint64(2**64 - 1)  # equals no slot's members
_LIST = np.uint64(1 << 62)
_ROW = np.uint64(2 << 62)
_TAG = np.uint64(3 << 62)
_NAME = np.uint64(0xFFF)
_S4, _S12, _S28, _S29, _S32, _S48, _S56, _S58, _S60 = (
    np.uint64(n) for n in (4, 12, 28, 29, 32, 48, 56, 58, 60)
)
_PAIRS, _NIBBLES = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_BYTES, _ONES = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
_SCRAMBLE = np.uint64(0x9E3779B97F4A7C15)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_LOWEST_BIT = np.zeros(64, np.int64)
for _bit in range(64):
    _LOWEST_BIT[((int(_DE_BRUIJN) << _bit) & (2**64 - 1)) >> 58] = _bit

Index: TypeAlias = "int | np.int64"  # never np.uint64: numba makes a float of the two together


class Table(NamedTuple):
    """Everything the kernels work on. The arrays are never replaced, only written."""

    pool: NDArray[np.uint64]  # segments, SEGMENT_WORDS each
    rows: NDArray[np.uint64]  # rows in use are dense: 0..NUM_ROWS-1
    directory: NDArray[np.int32]  # 2**DEPTH entries in use: segment by the hash's top bits
    segments: NDArray[np.int32]  # per segment: entries, depth
    free: NDArray[np.int32]  # stack of NUM_FREE segments; the lowest NUM_RELEASED hold no memory
    counters: NDArray[np.int64]
    scratch: NDArray[np.uint64]  # one segment
    alive: NDArray[np.uint64]  # mask words, a lookup's working set


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typing: Any, words: Any, index: Any) -> Any:
    """Ask the processor to bring a word near; numba offers no such function itself."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(array.data, [arguments[1]])
        number = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [address.type],
            ir.FunctionType(ir.VoidType(), [address.type, number, number, number]),
        )
        builder.call(prefetch, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(words, types.int64), emit


@compiled
def _scramble(block_hash: np.uint64) -> np.uint64:
    """A bijection that spreads any hashes over all bits; 0, which marks an empty slot, gives way to 1."""
    mixed = (block_hash ^ (block_hash >> _S32)) * _SCRAMBLE
    mixed ^= mixed >> _S29
    return mixed if mixed != _0 else _1


@compiled
def _lowest_bit(word: np.uint64) -> Index:
    return _LOWEST_BIT[((word & (~word + _1)) * _DE_BRUIJN) >> _S58]  # type: ignore[no-any-return]


@compiled
def _num_bits(word: np.uint64) -> Index:
    """Population count, in parallel by pairs, nibbles and bytes."""
    word -= (word >> _1) & _PAIRS
    word = (word & _NIBBLES) + ((word >> _2) & _NIBBLES)
    word = (word + (word >> _S4)) & _BYTES
    return np.int64((word * _ONES) >> _S56)


@compiled
def _fetch_ahead(table: Table, hashes: NDArray[np.uint64], index: Index) -> None:
    """Start loading the home slot of the hash FETCH_AHEAD places on (at the first hash: of all up to there).
    Without it a mispredicted branch of one probe holds up the loads of all later ones."""
    for ahead in range(index + FETCH_AHEAD if index > 0 else 0, min(index + FETCH_AHEAD + 1, hashes.size)):
        key = _scramble(hashes[ahead])
        slot = np.int64(key >> _S28) & _SLOT_MASK
        _prefetch(table.pool, _segment_of(table, key) * SEGMENT_WORDS + 2 * slot)


@compiled
def _segment_of(table: Table, key: np.uint64) -> Index:
    return np.int64(table.directory[np.int64(key >> np.uint64(64 - table.counters[DEPTH]))])


@compiled
def _probe(pool: NDArray[np.uint64], segment: Index, key: np.uint64) -> Index:
    """Word offset of the key's slot, or of the empty slot where it would go."""
    base = segment * SEGMENT_WORDS
    slot = np.int64(key >> _S28) & _SLOT_MASK
    while True:
        at = base + 2 * slot
        if pool[at] == key or pool[at] == _0:
            return at
        slot = (slot + 1) & _SLOT_MASK


# ---- sets of columns -------------------------------------------------------------------------------------------


@compiled
def _new_row(table: Table, key: np.uint64) -> Index:
    row = np.int64(table.counters[NUM_ROWS])
    table.counters[NUM_ROWS] += 1
    start = row * (table.alive.size + ROW_HEAD)
    table.rows[start] = key
    for word in range(start + 1, start + table.alive.size + ROW_HEAD):
        table.rows[word] = _0
    return row


@compiled
def _free_row(table: Table, row: Index) -> None:
    """Fill the hole with the last row, so that rows stay dense and memory can be given back from the end."""
    size = table.alive.size + ROW_HEAD
    table.counters[NUM_ROWS] -= 1
    last = table.counters[NUM_ROWS]
    if row != last:
        for word in range(size):
            table.rows[row * size + word] = table.rows[last * size + word]
        key = table.rows[row * size]
        table.pool[_probe(table.pool, _segment_of(table, key), key) + 1] = _ROW | np.uint64(row)


@compiled
def _add(table: Table, at: Index, column: Index) -> None:
    """Add `column` to the set in the slot at word `at`."""
    members = table.pool[at + 1]
    tag = members & _TAG
    if tag == _0:
        if column < MASK_COLUMNS:
            table.pool[at + 1] = members | (_1 << np.uint64(column))
            return
        if members != _0 and _num_bits(members) < LIST_COLUMNS:
            listed, shift = _LIST, _0
            while members != _0:
                listed |= np.uint64(_lowest_bit(members) + 1) << shift
                shift += _S12
                members &= members - _1
            members, tag = listed, _LIST
        elif members == _0:
            members, tag = _LIST, _LIST
    if tag == _LIST:
        name = np.uint64(column + 1)
        shift = _0
        while (members >> shift) & _NAME != _0 and (members >> shift) & _NAME < name and shift < _S60:
            shift += _S12
        if shift < _S60 and (members >> shift) & _NAME == name:
            return
        if (members >> _S48) & _NAME == _0:
            names = members ^ _LIST
            below = names & ((_1 << shift) - _1)
            above = names >> shift << (shift + _S12)
            table.pool[at + 1] = _LIST | below | (name << shift) | above
            return
    if tag != _ROW:
        members = _to_row(table, at, members)
    start = np.int64(members ^ _ROW) * (table.alive.size + ROW_HEAD)
    word = start + ROW_HEAD + (column >> 6)
    bit = _1 << np.uint64(column & 63)
    if table.rows[word] & bit == _0:
        table.rows[word] |= bit
        table.rows[start + 1] += _1


@compiled
def _to_row(table: Table, at: Index, members: np.uint64) -> np.uint64:
    """Move a mask's or a list's columns into a new row; its members."""
    row = _new_row(table, table.pool[at])
    start = row * (table.alive.size + ROW_HEAD)
    if members & _TAG == _0:
        table.rows[start + ROW_HEAD] = members
        table.rows[start + 1] = np.uint64(_num_bits(members))
    else:
        names = members ^ _LIST
        while names != _0:
            column = np.int64(names & _NAME) - 1
            table.rows[start + ROW_HEAD + (column >> 6)] |= _1 << np.uint64(column & 63)
            table.rows[start + 1] += _1
            names >>= _S12
    table.pool[at + 1] = _ROW | np.uint64(row)
    return table.pool[at + 1]  # type: ignore[no-any-return]


@compiled
def _settle_row(table: Table, at: Index) -> None:
    """After removals: a row that would fit a list with room to spare becomes one (or an empty set)."""
    row = np.int64(table.pool[at + 1] ^ _ROW)
    start = row * (table.alive.size + ROW_HEAD)
    if table.rows[start + 1] >= np.uint64(LIST_COLUMNS - 1):
        return
    listed, shift = _0, _0
    highest: Index = -1
    for word in range(table.alive.size):
        bits = table.rows[start + ROW_HEAD + word]
        while bits != _0:
            highest = word * 64 + _lowest_bit(bits)
            listed |= np.uint64(highest + 1) << shift
            shift += _S12
            bits &= bits - _1
    mask = table.rows[start + ROW_HEAD]
    table.pool[at + 1] = mask if highest < MASK_COLUMNS else _LIST | listed
    _free_row(table, row)


@compiled
def _discard(table: Table, at: Index, column: Index) -> bool:
    """Remove `column` from the set in the slot; whether it was there. The set may be empty afterwards: 0."""
    members = table.pool[at + 1]
    tag = members & _TAG
    if tag == _0:
        bit = _1 << np.uint64(column)
        if column >= MASK_COLUMNS or members & bit == _0:
            return False
        table.pool[at + 1] = members ^ bit
        return True
    if tag == _LIST:
        names = members ^ _LIST
        shift = _0
        while shift < _S60:
            if (names >> shift) & _NAME == np.uint64(column + 1):
                below = names & ((_1 << shift) - _1)
                names = below | (names >> (shift + _S12) << shift)
                table.pool[at + 1] = _LIST | names if names != _0 else _0
                return True
            shift += _S12
        return False
    start = np.int64(members ^ _ROW) * (table.alive.size + ROW_HEAD)
    word = start + ROW_HEAD + (column >> 6)
    bit = _1 << np.uint64(column & 63)
    if table.rows[word] & bit == _0:
        return False
    table.rows[word] ^= bit
    table.rows[start + 1] -= _1
    _settle_row(table, at)
    return True


# ---- segments --------------------------------------------------------------------------------------------------


@compiled
def _take_segment(table: Table) -> Index:
    """An empty segment, or -1 when all are in use."""
    counters = table.counters
    if counters[NUM_FREE] > 0:
        counters[NUM_FREE] -= 1
        counters[NUM_RELEASED] = min(counters[NUM_RELEASED], counters[NUM_FREE])
        segment = np.int64(table.free[counters[NUM_FREE]])
        for word in range(segment * SEGMENT_WORDS, (segment + 1) * SEGMENT_WORDS):
            table.pool[word] = _0
        return segment
    if counters[NUM_SEGMENTS] < table.free.size:
        counters[NUM_SEGMENTS] += 1
        return counters[NUM_SEGMENTS] - 1  # type: ignore[no-any-return]
    return -1


@compiled
def _set_depth(table: Table, segment: Index, depth: Index) -> None:
    table.segments[segment, 1] = depth
    table.counters[AT_DEPTH + depth] += 1


@compiled
def _point(table: Table, key: np.uint64, depth: Index, segment: Index) -> None:
    """Let every directory entry that shares the key's top `depth` bits name `segment`."""
    span = 1 << (table.counters[DEPTH] - depth)
    first = np.int64(key >> np.uint64(64 - depth)) * span
    for entry in range(first, first + span):
        table.directory[entry] = segment


@compiled
def _move_entries(table: Table, source: Index) -> None:
    """Empty `source`, then put its entries where the directory says. Rows follow their keys by themselves."""
    base = source * SEGMENT_WORDS
    for word in range(SEGMENT_WORDS):
        table.scratch[word] = table.pool[base + word]
        table.pool[base + word] = _0
    table.segments[source, 0] = 0
    for word in range(0, SEGMENT_WORDS, 2):
        key = table.scratch[word]
        if key != _0 and table.scratch[word + 1] != _0:
            target = _segment_of(table, key)
            at = _probe(table.pool, target, key)
            table.pool[at] = key
            table.pool[at + 1] = table.scratch[word + 1]
            table.segments[target, 0] += 1


@compiled
def _split(table: Table, key: np.uint64) -> bool:
    """Split the key's segment in two; False when no segment or no depth is left."""
    segment = _segment_of(table, key)
    depth = np.int64(table.segments[segment, 1])
    if 1 << depth >= table.directory.size:
        return False
    sibling = _take_segment(table)
    if sibling < 0:
        return False
    if depth == table.counters[DEPTH]:
        for entry in range((1 << depth) - 1, -1, -1):
            table.directory[2 * entry] = table.directory[2 * entry + 1] = table.directory[entry]
        table.counters[DEPTH] += 1
    table.counters[AT_DEPTH + depth] -= 1
    _set_depth(table, segment, depth + 1)
    _set_depth(table, sibling, depth + 1)
    table.segments[sibling, 0] = 0
    _point(table, key | (_1 << np.uint64(63 - depth)), depth + 1, sibling)
    _move_entries(table, segment)
    return True


@compiled
def _merge(table: Table, key: np.uint64) -> None:
    """Merge the key's segment with its sibling, again and again, while both together stay small."""
    counters = table.counters
    while True:
        segment = _segment_of(table, key)
        depth = np.int64(table.segments[segment, 1])
        if depth <= MIN_DEPTH:
            return
        sibling_key = key ^ (_1 << np.uint64(64 - depth))
        sibling = _segment_of(table, sibling_key)
        together = table.segments[segment, 0] + table.segments[sibling, 0]
        if table.segments[sibling, 1] != depth or together > MERGE_FILL:
            return
        _point(table, sibling_key, depth, segment)
        _move_entries(table, sibling)
        counters[AT_DEPTH + depth] -= 2
        _set_depth(table, segment, depth - 1)
        table.free[counters[NUM_FREE]] = sibling
        counters[NUM_FREE] += 1
        while counters[DEPTH] > MIN_DEPTH and counters[AT_DEPTH + counters[DEPTH]] == 0:
            counters[DEPTH] -= 1
            for entry in range(1 << counters[DEPTH]):
                table.directory[entry] = table.directory[2 * entry]


@compiled
def _erase(table: Table, segment: Index, at: Index) -> None:
    """Empty a slot and shift back whatever the gap would cut off from its home slot."""
    pool = table.pool
    base = segment * SEGMENT_WORDS
    hole = slot = (at - base) >> 1
    while True:
        slot = (slot + 1) & _SLOT_MASK
        key = pool[base + 2 * slot]
        if key == _0:
            break
        home = np.int64(key >> _S28) & _SLOT_MASK
        if (slot - home) & _SLOT_MASK >= (slot - hole) & _SLOT_MASK:
            pool[base + 2 * hole] = key
            pool[base + 2 * hole + 1] = pool[base + 2 * slot + 1]
            hole = slot
    pool[base + 2 * hole] = _0
    pool[base + 2 * hole + 1] = _0
    table.segments[segment, 0] -= 1
    table.counters[NUM_BLOCKS] -= 1


# ---- called from Python ----------------------------------------------------------------------------------------


@compiled
def open_table(table: Table) -> None:
    """Make a zeroed table usable: the first segments, at the least depth."""
    table.counters[DEPTH] = MIN_DEPTH
    for entry in range(1 << MIN_DEPTH):
        segment = _take_segment(table)
        table.directory[entry] = segment
        _set_depth(table, segment, np.int64(MIN_DEPTH))


@compiled
def store(table: Table, column: Index, hashes: NDArray[np.uint64]) -> int:
    """Add `column` to every hash; how many of them now have it (fewer than given: the table is full)."""
    stored = 0
    for index in range(hashes.size):
        _fetch_ahead(table, hashes, index)
        key = _scramble(hashes[index])
        segment = _segment_of(table, key)
        at = _probe(table.pool, segment, key)
        if table.pool[at] == _0:
            if table.counters[NUM_BLOCKS] >= table.counters[MAX_BLOCKS]:
                continue
            while table.segments[segment, 0] >= MAX_FILL and _split(table, key):
                segment = _segment_of(table, key)
            if table.segments[segment, 0] >= MAX_FILL:
                continue
            at = _probe(table.pool, segment, key)
            table.pool[at] = key
            table.segments[segment, 0] += 1
            table.counters[NUM_BLOCKS] += 1
        _add(table, at, column)
        stored += 1
    return stored


@compiled
def remove(table: Table, column: Index, hashes: NDArray[np.uint64]) -> int:
    """Take `column` out of every hash; how many had it. A hash without columns leaves the table."""
    removed = 0
    for index in range(hashes.size):
        _fetch_ahead(table, hashes, index)
        key = _scramble(hashes[index])
        segment = _segment_of(table, key)
        at = _probe(table.pool, segment, key)
        if table.pool[at] != _0 and _discard(table, at, column):
            removed += 1
            if table.pool[at + 1] == _0:
                _erase(table, segment, at)
                if table.segments[segment, 0] <= MERGE_FILL:
                    _merge(table, key)
    return removed


@compiled
def sweep(  # noqa: PLR0912
    table: Table, doomed: NDArray[np.uint64], cursor: np.uint64, max_segments: int
) -> np.uint64:
    """Take the columns in mask `doomed` out of up to `max_segments` segments, from hash `cursor` on; the next
    cursor, 0 after the last segment. The cursor is a hash, not a segment, so that splits and merges between
    two calls skip nothing."""
    for _ in range(max_segments):
        segment = _segment_of(table, cursor)
        base = segment * SEGMENT_WORDS
        emptied = 0
        for at in range(base, base + SEGMENT_WORDS, 2):
            if table.pool[at] == _0:
                continue
            members = table.pool[at + 1]
            tag = members & _TAG
            if tag == _0:
                table.pool[at + 1] = members & ~doomed[0]
            elif tag == _LIST:
                names = members ^ _LIST
                while names != _0:
                    column = np.int64(names & _NAME) - 1
                    if (doomed[column >> 6] >> np.uint64(column & 63)) & _1 != _0:
                        _discard(table, at, column)
                    names >>= _S12
            else:
                start = np.int64(members ^ _ROW) * (table.alive.size + ROW_HEAD)
                count: Index = 0
                for word in range(table.alive.size):
                    table.rows[start + ROW_HEAD + word] &= ~doomed[word]
                    count += _num_bits(table.rows[start + ROW_HEAD + word])
                table.rows[start + 1] = np.uint64(count)
                _settle_row(table, at)
            if table.pool[at + 1] == _0:
                emptied += 1
        if emptied > 0:
            _move_entries(table, segment)  # drops the empty ones
            table.counters[NUM_BLOCKS] -= emptied
        depth = np.uint64(table.segments[segment, 1])
        end = ((cursor >> (np.uint64(64) - depth)) + _1) << (np.uint64(64) - depth)
        if table.segments[segment, 0] <= MERGE_FILL:
            _merge(table, cursor)
        cursor = end
        if cursor == _0:
            break
    return cursor


@compiled
def _narrow(
    table: Table, members: np.uint64, depth: Index, replicas: NDArray[np.int32], counts: NDArray[np.int32]
) -> Index:
    """Keep of the alive columns only `members`; the others' replicas have matched `depth` blocks. How many
    columns left."""
    alive = table.alive
    tag = members & _TAG
    start = np.int64(members ^ _ROW) * (alive.size + ROW_HEAD) + ROW_HEAD if tag == _ROW else 0
    left: Index = 0
    for word in range(alive.size):
        if alive[word] == _0:
            continue
        if tag == _ROW:
            gone = alive[word] & ~table.rows[start + word]
        elif tag == _LIST:
            gone = alive[word]
            names = members ^ _LIST
            while names != _0:
                column = np.int64(names & _NAME) - 1
                if column >> 6 == word:
                    gone &= ~(_1 << np.uint64(column & 63))
                names >>= _S12
        else:
            gone = alive[word] & ~members if word == 0 else alive[word]
        alive[word] ^= gone
        while gone != _0:
            if depth > 0:
                counts[replicas[word * 64 + _lowest_bit(gone)]] = depth
            left += 1
            gone &= gone - _1
    return left


@compiled
def _finish(table: Table, depth: Index, replicas: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
    """Every alive column's replica has matched `depth` blocks."""
    for word in range(table.alive.size):
        bits = table.alive[word]
        while bits != _0:
            counts[replicas[word * 64 + _lowest_bit(bits)]] = depth
            bits &= bits - _1


@compiled
def longest_prefix(
    table: Table,
    live: NDArray[np.uint64],
    replicas: NDArray[np.int32],
    hashes: NDArray[np.uint64],
    counts: NDArray[np.int32],
) -> None:
    """Fill `counts` with the number of leading hashes that each replica has. `live` is the mask of the columns
    in use, `replicas` names each one's replica."""
    for replica in range(counts.size):
        counts[replica] = 0
    left: Index = 0
    for word in range(live.size):
        table.alive[word] = live[word]
        left += _num_bits(live[word])
    seen = _UNSEEN
    depth = 0
    shift = np.uint64(64 - table.counters[DEPTH])
    while depth < hashes.size and left > 0:
        _fetch_ahead(table, hashes, depth)
        key = _scramble(hashes[depth])
        at = _probe(table.pool, np.int64(table.directory[np.int64(key >> shift)]), key)
        if table.pool[at] == _0:
            break
        members = table.pool[at + 1]
        if members != seen:
            left -= _narrow(table, members, depth, replicas, counts)
            seen = members
        depth += 1
    if left > 0 and depth > 0:
        _finish(table, depth, replicas, counts)


@compiled
def _keeps_alive(table: Table, members: np.uint64) -> bool:
    """Whether every alive column is one of `members`."""
    tag = members & _TAG
    start = np.int64(members ^ _ROW) * (table.alive.size + ROW_HEAD) + ROW_HEAD if tag == _ROW else 0
    for word in range(table.alive.size):
        alive = table.alive[word]
        if alive == _0:
            continue
        if tag == _ROW:
            alive &= ~table.rows[start + word]
        elif tag == _LIST:
            names = members ^ _LIST
            while names != _0:
                column = np.int64(names & _NAME) - 1
                if column >> 6 == word:
                    alive &= ~(_1 << np.uint64(column & 63))
                names >>= _S12
        elif word == 0:
            alive &= ~members
        if alive != _0:
            return False
    return True


@compiled
def _members_of(table: Table, block_hash: np.uint64) -> np.uint64:
    """The set of a hash, 0 (the empty set) when the table does not hold it."""
    key = _scramble(block_hash)
    return table.pool[_probe(table.pool, _segment_of(table, key), key) + 1]  # type: ignore[no-any-return]


@compiled
def closed_prefix(
    table: Table,
    live: NDArray[np.uint64],
    replicas: NDArray[np.int32],
    hashes: NDArray[np.uint64],
    counts: NDArray[np.int32],
) -> None:
    """`longest_prefix` where whoever holds a hash also holds all before it: blocks between two that the same
    replicas hold are not looked at. Bisection, from left to right; a stack in `scratch` keeps the depths and sets
    seen on the way down."""
    for replica in range(counts.size):
        counts[replica] = 0
    left: Index = 0
    for word in range(live.size):
        table.alive[word] = live[word]
        left += _num_bits(live[word])
    stack = table.scratch
    height = 1
    low = np.int64(-1)  # up to here every alive column matches
    stack[0] = np.uint64(hashes.size - 1)
    stack[1] = _members_of(table, hashes[hashes.size - 1]) if hashes.size > 0 else _0
    while left > 0 and low < hashes.size - 1:
        high = np.int64(stack[2 * height - 2])
        members = stack[2 * height - 1]
        if _keeps_alive(table, members):
            low = high
            height -= 1
        elif high == low + 1:
            left -= _narrow(table, members, high, replicas, counts)
            low = high
            height -= 1
        else:
            middle = (low + high) // 2
            stack[2 * height] = np.uint64(middle)
            stack[2 * height + 1] = _members_of(table, hashes[middle])
            height += 1
    if left > 0 and hashes.size > 0:
        _finish(table, hashes.size, replicas, counts)


@compiled
def extend_prefix(  # noqa: PLR0917 - numba takes no keywords from Python cheaply
    table: Table,
    columns: NDArray[np.int32],
    replicas: NDArray[np.int32],
    hashes: NDArray[np.uint64],
    counts: NDArray[np.int32],
    first: NDArray[np.int32],
    following: NDArray[np.int32],
) -> bool:
    """Move each replica's count forward over the hashes that it has from there on. `first` (one per hash) and
    `following` (one per replica) are scratch: the chain of replicas that start at a hash. False, and nothing is
    changed, when a count lies outside 0..len(hashes)."""
    for depth in range(hashes.size):
        first[depth] = -1
    waiting = 0
    for replica in range(counts.size):
        start = counts[replica]
        if start < 0 or start > hashes.size:
            return False
        if columns[replica] >= 0 and start < hashes.size:
            following[replica] = first[start]
            first[start] = replica
            waiting += 1
    for word in range(table.alive.size):
        table.alive[word] = _0
    left: Index = 0
    seen = _UNSEEN
    for depth in range(hashes.size):
        if first[depth] >= 0:
            joining = np.int64(first[depth])
            while joining >= 0:
                column = np.int64(columns[joining])
                table.alive[column >> 6] |= _1 << np.uint64(column & 63)
                waiting -= 1
                left += 1
                joining = np.int64(following[joining])
            seen = _UNSEEN
        if left > 0:
            key = _scramble(hashes[depth])
            at = _probe(table.pool, _segment_of(table, key), key)
            members = table.pool[at + 1]  # 0, the empty set, in an empty slot
            if members != seen:
                # A replica that starts here and goes no further keeps the count it has: `depth`.
                left -= _narrow(table, members, depth, replicas, counts)
                seen = members
        if left == 0 and waiting == 0:
            return True
    _finish(table, hashes.size, replicas, counts)
    return True
