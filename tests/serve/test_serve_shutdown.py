"""The end of Serve itself. In a file of its own, after the others: they need it."""

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(180)]
serve = pytest.importorskip("ray.serve")

from headrace.serve import build_app  # noqa: E402

from .conftest import Ground, config  # noqa: E402


def test_a_fleet_ends_with_serve(ground: Ground) -> None:
    serve.run(build_app(config("last", 1)), name="last", route_prefix="/last")
    assert ground.chat(prefix="/last")["model"] == "sim"
    serve.shutdown()
    ground.until(lambda: not ground.actors("last/"), "the fleet outlives Serve")
