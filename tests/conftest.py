"""For all tests."""

from __future__ import annotations

import logging
import signal

import pytest
from hypothesis import settings

# A shell's background job ignores Ctrl-C and hands that on to all that it starts: programs that a test interrupts would
# not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: what an example takes says more of the machine's other work than of ours. The blob that is printed
# replays a failure.
settings.register_profile("headrace", deadline=None, print_blob=True)
settings.load_profile("headrace")

ROOT_LEVEL = logging.root.level


@pytest.fixture(autouse=True)
def _root_level() -> None:
    """As it was: vLLM, started in this process, raises it for all loggers."""
    logging.root.setLevel(ROOT_LEVEL)
