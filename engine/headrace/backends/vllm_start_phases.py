"""What vLLM's engine is doing while it starts, read from what its processes say.

The engine starts in processes of its own and tells this one nothing until it has finished. Under Ray their stdout and
ours is one file, in which they announce each step (vLLM 0.32, at its default log level and stream). Where they say
nothing, or where stdout is no file, the whole start is one phase.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.1

STEPS: tuple[tuple[str, str], ...] = (
    (r"Initializing a V1 LLM engine", "workers"),
    (r"Starting to load model", "weights"),
    (r"Loading weights took|Model loading took", "kv cache"),
    (r"Starting torch\.compile", "compile"),
    (r"Capturing CUDA graphs|Warming up model", "warm-up"),
    (r"init engine \(.*\) took", "handshake"),
)
"""What is said when a step begins, and the step's name, in their order."""


STDOUT, STDERR = 1, 2


class StartLog:
    """What comes from now on in the file behind this process's stdout. Nothing where that is no file."""

    def __init__(self, descriptor: int = STDOUT) -> None:
        self._path = path(descriptor)
        self._at = size(descriptor)
        self._rest = ""

    def new_lines(self) -> Iterator[str]:
        """Whole lines that have come since the last call."""
        if self._path is None:
            return
        try:
            with open(self._path, "rb") as log:
                log.seek(self._at)
                text = log.read()
        except OSError:
            return
        self._at += len(text)
        *lines, self._rest = (self._rest + text.decode(errors="replace")).split("\n")
        yield from lines


class StepReader:
    """Names the step that a line begins. Steps never go back: a second worker's line is no news."""

    def __init__(self) -> None:
        self._next = 0

    def step(self, line: str) -> str | None:
        """The step that begins with this line, None where none does."""
        for number in range(self._next, len(STEPS)):
            pattern, name = STEPS[number]
            if re.search(pattern, line):
                self._next = number + 1
                return name
        return None


async def follow(log: StartLog, enter: Callable[[str], None]) -> None:
    """Call `enter` with each step as it begins, until cancelled."""
    reader = StepReader()
    while True:
        for line in log.new_lines():
            if (name := reader.step(line)) is not None:
                enter(name)
        await asyncio.sleep(POLL_S)


def path(descriptor: int) -> Path | None:
    """The file behind a descriptor, None where that is no file. Engine processes inherit it."""
    try:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return None
    return target if target.is_file() else None


def size(descriptor: int) -> int:
    """Bytes in it so far."""
    found = path(descriptor)
    return 0 if found is None else found.stat().st_size
