"""When a node counts as lost, and what is ended on one that comes back."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from headrace.fleet.lost_nodes import OWN_TITLE, Silences, end_replicas


def test_a_node_is_lost_after_its_silence_and_comes_back_once() -> None:
    silences = Silences(15.0)
    assert silences.take({"a": False, "b": True}, 100.0) == (set(), set())
    assert silences.take({"a": False, "b": True}, 114.0) == (set(), set())
    assert silences.take({"a": False, "b": True}, 115.0) == ({"a"}, set())
    assert silences.take({"a": False, "b": True}, 117.0) == ({"a"}, set())
    assert silences.take({"a": True, "b": True}, 119.0) == (set(), {"a"})
    assert silences.take({"a": True, "b": True}, 121.0) == (set(), set())


def test_a_short_silence_is_forgotten() -> None:
    silences = Silences(15.0)
    for now_s, is_there in ((0.0, False), (10.0, True), (12.0, False), (26.0, False)):
        assert silences.take({"a": is_there}, now_s) == (set(), set())


def test_a_node_that_ray_gives_up_does_not_come_back() -> None:
    silences = Silences(15.0)
    silences.take({"a": False}, 0.0)
    assert silences.take({"a": False}, 20.0) == ({"a"}, set())
    assert silences.take({}, 30.0) == (set(), set())
    assert silences.take({"a": True}, 40.0) == (set(), set())


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.booleans()), max_size=40))
def test_lost_exactly_while_unreached_for_long(looks: list[tuple[float, bool]]) -> None:
    silences, now_s, since_s, was_lost = Silences(15.0), 0.0, None, False
    for step_s, is_there in looks:
        now_s += step_s
        since_s = None if is_there else now_s if since_s is None else since_s
        lost, back = silences.take({"a": is_there}, now_s)
        assert (lost == {"a"}) == (since_s is not None and now_s - since_s >= 15.0)
        assert back <= {"a"} and (not back or is_there)
        assert not (was_lost and is_there) or back == {"a"}
        was_lost = bool(lost)


def test_only_processes_of_replicas_are_ended() -> None:
    def start(title: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", "input()", title], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    replica, other = start(f"ray::{OWN_TITLE}"), start("somebody else's")
    gone = start(OWN_TITLE)
    gone.kill()
    gone.wait()
    try:
        assert end_replicas([replica.pid, other.pid, gone.pid]) == [replica.pid]
        assert replica.wait(10) == -9
        assert other.poll() is None
    finally:
        for process in (replica, other, gone):
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
