"""Memory that is reserved whole and used by the page, so that a table can grow without ever being copied."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

WORD_BYTES = 8
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; Python names it from 3.13 on


class AddressSpace:
    """`num_words` zeroed 64-bit words, of which only the touched pages occupy memory.

    Raises MemoryError when the system refuses the reservation (`ulimit -v`, vm.overcommit_memory=2).
    """

    def __init__(self, num_words: int) -> None:
        num_bytes = -(-num_words * WORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except OSError as error:
            raise MemoryError(
                f"cannot reserve {num_bytes} bytes of address space ({error.strerror}); "
                "lower max_blocks or raise `ulimit -v`"
            ) from error
        self.words: NDArray[np.uint64] = np.frombuffer(self._pages, dtype=np.uint64)

    def release(self, first_word: int, end_word: int) -> None:
        """Give the whole pages inside [first_word, end_word) back to the system; they read as zero again."""
        start = -(-first_word * WORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end_word * WORD_BYTES // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._pages.madvise(mmap.MADV_DONTNEED, start, end - start)
