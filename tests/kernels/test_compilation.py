"""Machine code: made before the first request, kept between processes, possible without a writable folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np

import headrace_kernels
from headrace_kernels import block_hash, counted_map, prefix_kernel
from headrace_kernels.compilation import entry_points, warm
from headrace_kernels.prefix_table import PrefixTable


def test_after_warming_no_call_compiles_anything() -> None:
    warm()
    kernels = [
        kernel for module in (block_hash, counted_map, prefix_kernel) for kernel in entry_points(module)
    ]
    before = [len(kernel.signatures) for kernel in kernels]
    assert all(before), "a kernel that Python calls is not warmed"
    frozen = np.frombuffer(bytes(64), np.uint32)
    for tokens in (frozen, np.arange(40), array("I", range(40)), [1, 2, 3, 4], np.zeros((4, 4), np.int32)):
        hashes = block_hash.hash_blocks(tokens, 2, 0)
        hashes.flags.writeable = False
        table = PrefixTable(300)
        table.store(0, hashes)
        table.extend_prefix(hashes, table.longest_prefix(hashes))
        table.remove(0, hashes)
        table.clear(0)
        table.sweep()
        copies = counted_map.CountedMap()
        copies.add(hashes, hashes)
        copies.get(3)
        copies.drop(hashes)
    block_hash.hash_chunks(memoryview(b"abcdefghij")[1:], 4, 0)
    assert [len(kernel.signatures) for kernel in kernels] == before


def run_warm(source: Path, home: Path, cache: Path | None) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(source), "XDG_CACHE_HOME": str(home / "cache")}
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    program = "import headrace_kernels.compilation as c; print(c.__file__, c.warm().from_cache)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    path, from_cache = done.stdout.split()
    assert path.startswith(str(source)), "another copy of the package was imported"
    return from_cache


def test_a_second_process_compiles_nothing_even_where_the_package_is_read_only(tmp_path: Path) -> None:
    source = tmp_path / "site"
    package = source / "headrace_kernels"
    shutil.copytree(
        Path(headrace_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    # A file where the folder would be: unlike permissions, it also stops a test that runs as root.
    (package / "__pycache__").write_text("")
    cache = tmp_path / "cache"
    assert run_warm(source, tmp_path, cache) == "False"
    assert any(cache.rglob("*.nbi"))
    assert run_warm(source, tmp_path, cache) == "True"
