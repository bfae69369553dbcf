"""Three nodes and a fleet on them, for all tests of this folder. What one test has broken is mended before the next."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import network
import pytest
from cluster import Cluster
from netns_fleet import CONFIG, Figures, Fleet
from served import serving

_figures = Figures()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := network.missing():
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="session")
def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    config = tmp_path_factory.mktemp("netns") / "config.yaml"
    config.write_text(json.dumps(CONFIG))
    where = {"inside": cluster.head.inside, "environment": cluster.environment}
    with serving(config, "--address", cluster.address, **where) as served:
        assert served.url
        yield Fleet(cluster, served)
        code = served.end()
        assert (code, served.lines[-1], cluster.observer.actors()) == (0, "stopped", []), served.lines


@pytest.fixture
async def fleet(running: Fleet) -> AsyncIterator[Fleet]:
    """Every node is there, every replica is ready."""
    await running.mend()
    yield running


@pytest.fixture(scope="session")
def figures() -> Figures:
    """What is told of here is shown after the tests."""
    return _figures


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _figures.lines:
        terminalreporter.write_line(line)
