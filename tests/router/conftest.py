"""Machine code first: compiling it takes seconds, which would break the deadlines of property tests."""

from __future__ import annotations

import pytest

from headrace_kernels.compilation import Warmth, warm


@pytest.fixture(scope="session", autouse=True)
def warmth() -> Warmth:
    """What warming took. Everything else in this folder runs after it."""
    return warm()
