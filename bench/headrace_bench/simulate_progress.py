"""How far a simulation is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_LINE_S = 5.0
"""Where the screen is no terminal, progress is a line this often."""


@contextmanager
def progress_bar(screen: Console, requests: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal, now and then a line elsewhere."""
    if not screen.is_terminal:
        yield _plain_progress(screen, requests)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=requests)
        yield lambda ended, name: bar.update(task, completed=ended, description=name)


def _plain_progress(screen: Console, requests: int) -> Callable[[int, str], None]:
    began_s = told_s = time.monotonic()

    def tell(ended: int, name: str) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= PLAIN_LINE_S:
            told_s = now_s
            screen.print(f"{now_s - began_s:.0f} s: {ended}/{requests}, {name}", highlight=False)

    return tell
