"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# No deadline: what an example takes says more of the machine's other work than of ours. The blob that is printed
# replays a failure.
settings.register_profile("headrace", deadline=None, print_blob=True)
settings.load_profile("headrace")
