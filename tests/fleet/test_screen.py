"""What people and waiting programs read."""

import io
from dataclasses import replace

from headrace.fleet.screen import Screen, duration, status_table
from headrace.fleet.status import FleetStatus, ReplicaStatus
from headrace.fleet.status_command import as_data
from headrace_router.types import ReplicaId, ReplicaState, Role

STARTING = ReplicaStatus(
    ReplicaId("m-unified-0"), "m", Role.UNIFIED, ReplicaState.STARTING, state_s=12.4, phase="engine"
)
READY = replace(
    STARTING, state=ReplicaState.READY, phase="ready", start_s=35, pid=7, running=2, waiting=0, kv_use=0.5
)


def fleet(*replicas: ReplicaStatus) -> FleetStatus:
    return FleetStatus("headrace", "epoch", 1, replicas)


def test_without_a_terminal_each_change_is_one_line_and_no_change_is_none() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    for status in (fleet(STARTING), fleet(STARTING), fleet(READY)):
        screen.progress(status)
    assert err.getvalue().splitlines() == [
        "m-unified-0: starting, engine (12 s)",
        "m-unified-0: ready after 35 s, pid 7",
    ]


def test_a_restart_between_two_looks_is_told_with_its_reason() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    screen.changes(fleet(READY))
    screen.changes(fleet(replace(READY, restarts=1, reason="its process died")))
    assert "m-unified-0: its process died; started again" in err.getvalue().splitlines()


def test_the_banner_has_the_ready_line_alone_on_stdout() -> None:
    out = io.StringIO()
    Screen(out, io.StringIO()).ready("http://127.0.0.1:1234", fleet(READY))
    lines = out.getvalue().splitlines()
    assert lines[0] == "ready: http://127.0.0.1:1234"
    assert "curl http://127.0.0.1:1234/v1/chat/completions" in lines[1]


def test_the_table_has_a_column_for_everything_asked_of_it() -> None:
    headings = [str(column.header) for column in status_table(fleet(READY), "").columns]
    for wanted in ("model", "role", "state", "running", "waiting", "KV use", "uptime"):
        assert wanted in headings


def test_json_carries_every_field_of_every_replica() -> None:
    (replica,) = as_data(fleet(READY), "http://x")["replicas"]
    assert (replica["id"], replica["state"], replica["running"], replica["kv_use"]) == (
        "m-unified-0",
        "ready",
        2,
        0.5,
    )


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (5, 185, 7500, 3 * 86400 + 4 * 3600)] == ["5s", "3m05s", "2h05m", "3d04h"]
