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
    screen.changes(fleet(replace(READY, restarts=1, last_failure="its process died")))
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


def test_many_replicas_that_do_the_same_share_a_line_and_failures_never_do() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    many = [replace(STARTING, id=ReplicaId(f"m-unified-{n}")) for n in range(16)]
    screen.progress(fleet(*many))
    failed = [replace(row, state=ReplicaState.FAILED, reason="why") for row in many]
    screen.changes(fleet(*failed))
    lines = err.getvalue().splitlines()
    assert lines[0] == "m-unified-0 and 15 more: starting, engine (12 s)"
    assert len(lines) == 1 + 16


def test_a_start_that_has_nothing_to_tell_says_so_every_15_seconds() -> None:
    now_s = 0.0
    err = io.StringIO()
    screen = Screen(io.StringIO(), err, clock=lambda: now_s)
    for now_s in (0.0, 14.0, 16.0, 20.0, 31.0, 32.0):  # noqa: B007 - read by the clock
        screen.progress(fleet(STARTING))
    lines = err.getvalue().splitlines()
    assert lines[1:] == ["still starting, 0 of 1 ready: m-unified-0: starting, engine (12 s)"] * 2


def test_the_banner_says_how_headrace_is_called() -> None:
    out = io.StringIO()
    Screen(out, io.StringIO()).ready("http://127.0.0.1:1234", fleet(READY))
    assert "headrace status" in out.getvalue()


def test_a_fleet_that_starts_has_no_url_yet() -> None:
    assert "starting; will be at http://x" in str(status_table(fleet(STARTING), "http://x", False).title)
    assert as_data(fleet(STARTING), "http://x", False)["state"] == "starting"
