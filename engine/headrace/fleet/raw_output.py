"""Ray's own lines, kept away from the user's terminal.

Its C++ half writes warnings to file descriptor 2, its Python half prints to `sys.stdout`, in paragraphs, about
deaths that the controller reports with a reason. Neither asks a logger first.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path


class RawOutput:
    """Descriptor 2 leads into a file from `divert` on; Python's `sys.stderr` goes where it went before."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def divert(self) -> None:
        """For the rest of this process's life: Ray writes until its very end."""
        with contextlib.suppress(OSError):  # a folder that cannot be written costs tidiness only
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            sys.stderr.flush()
            terminal = os.dup(2)
            os.dup2(file, 2)
            os.close(file)
            raw = io.FileIO(terminal, "w", closefd=False)
            sys.stderr = io.TextIOWrapper(
                io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
            )

    def remove(self) -> None:
        """Nobody will want to read it."""
        self._path.unlink(missing_ok=True)

    def keep_in(self, folder: Path) -> None:
        """Move it beside the other logs."""
        with contextlib.suppress(OSError):
            shutil.move(self._path, folder / "headrace-serve.err")
