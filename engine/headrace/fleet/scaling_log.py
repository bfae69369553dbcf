"""Decisions of scaling, kept: the last ones in memory, all of them in a file.

The file is JSON, one decision a line, appended and never rewritten; at 4 MB it becomes `.1`, so that it takes at most
8 MB. It lies beside the run file of the controller's node and outlives the controller, which reads its end when it
comes back, and the fleet.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.fleet import run_file

MOST_BYTES = 4 * 1024 * 1024
KEPT = 200
_TAIL_BYTES = 256 * 1024


def path_of(fleet: str) -> Path:
    """Where the decisions of a fleet of that name are kept on this machine."""
    return run_file.folder() / f"{fleet}.scaling.jsonl"


class ScalingLog:
    """Of one fleet. A file that cannot be written costs the file, never a decision."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._kept: deque[Mapping[str, Any]] = deque(self._tail(), maxlen=KEPT)
        self._last: dict[str, tuple[Any, ...]] = {}  # by pool, what was written last

    def note(self, decision: Mapping[str, Any]) -> bool:
        """Keep a decision that changes something and does not just say the last one again. Whether it was kept."""
        pool = str(decision["pool"])
        says = (decision["target"], decision["current"], decision["effect"], decision["pin"])
        if decision["effect"] == "none":
            self._last.pop(pool, None)
            return False
        if self._last.get(pool) == says:
            return False
        self._last[pool] = says
        self._kept.append(decision)
        with contextlib.suppress(OSError):
            self._append(json.dumps(decision, separators=(",", ":")) + "\n")
        return True

    def latest(self, pool: str | None, last: int) -> list[Mapping[str, Any]]:
        """The last ones, of one pool or of all, newest last."""
        kept = [one for one in list(self._kept) if pool in (None, one["pool"])]  # noted from a thread
        return kept[-last:] if last > 0 else []

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size + len(line) > self._most_bytes:
                self.path.replace(self.path.with_name(self.path.name + ".1"))
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _tail(self) -> Sequence[Mapping[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - _TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ()
        found = []
        for line in lines:  # the first may be half of one
            with contextlib.suppress(ValueError):
                one = json.loads(line)
                if isinstance(one, dict) and {"pool", "target", "reason"} <= one.keys():
                    found.append(one)
        return found
