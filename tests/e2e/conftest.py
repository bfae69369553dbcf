"""`headrace serve` as a fixture."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import served


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[served.Served]]:
    """`with serving(config, "--port", "0") as served:` runs one; everything of it is gone afterwards."""
    return served.serving


@pytest.fixture(scope="session")
def ends() -> Callable[[int], Callable[[], bool]]:
    """`wait = ends(pid)` before a process is to end; `wait()` says whether it has."""
    return served.ends
