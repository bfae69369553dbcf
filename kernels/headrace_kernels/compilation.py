"""Numba with two promises: the machine code is cached, and no request pays for making it.

A kernel calls only kernels of its own file: numba's cache looks at one source file's time and size, so machine
code that inlined a function of another file would outlive a change to that file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """`function` as machine code, made at its first call or loaded from numba's cache.

    Numba keeps the cache in NUMBA_CACHE_DIR when that is set, else in `__pycache__` beside the source, else (a
    read-only installation) in the user's cache folder. Where none of them can be written, the code is compiled
    anew in every process: `warm` then takes seconds instead of tenths.
    """
    try:
        machine_code: Function = numba.njit(cache=True)(function)
    except RuntimeError:  # "cannot cache function ...: no locator available"
        machine_code = numba.njit(function)
    return machine_code


class Warmth(NamedTuple):
    """What `warm` did."""

    seconds: float
    from_cache: bool  # nothing had to be compiled


def warm() -> Warmth:
    """Load, or compile where no cache holds it, every kernel that a request or a KV event can reach.

    Call it once before the first request. The calls are real ones on small data, so they load exactly the
    signatures that production uses; a test holds that no later call adds one.
    """
    from headrace_kernels import block_hash, counted_map, prefix_kernel
    from headrace_kernels.prefix_table import PrefixTable

    started_s = time.perf_counter()
    hashes = block_hash.hash_blocks(range(32), 16, block_hash.salt("warm"))
    block_hash.hash_chunks(b"warm" * 64, 64, 0)
    table = PrefixTable(num_replicas=2, max_blocks=64)
    table.store(0, hashes)
    table.longest_prefix(hashes, closed=True)
    table.extend_prefix(hashes, table.longest_prefix(hashes))
    table.remove(0, hashes[1:])
    table.clear(0)
    table.sweep()
    copies = counted_map.CountedMap()
    copies.add(np.arange(64, dtype=np.uint64), np.arange(64, dtype=np.uint64))
    copies.drop(hashes)
    copies.get(1)
    copies.check_integrity()
    misses = sum(
        sum(kernel.stats.cache_misses.values()) if kernel.stats.cache_path else len(kernel.signatures)
        for module in (block_hash, counted_map, prefix_kernel)
        for kernel in entry_points(module)
    )
    return Warmth(time.perf_counter() - started_s, misses == 0)


def entry_points(module: object) -> list[numba.core.dispatcher.Dispatcher]:
    """The kernels of `module` that Python calls: those without a leading underscore."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, numba.core.dispatcher.Dispatcher) and not name.startswith("_")
    ]
