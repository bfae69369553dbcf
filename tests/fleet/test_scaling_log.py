"""Decisions are kept: the last in memory, all in a bounded file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.fleet.scaling_log import ScalingLog


def decision(target: int, pool: str = "m", effect: str = "applied", **more: Any) -> dict[str, Any]:
    return {
        "pool": pool,
        "target": target,
        "current": 1,
        "effect": effect,
        "pin": None,
        "reason": "r",
        **more,
    }


def test_only_what_changes_something_is_kept_and_only_once(tmp_path: Path) -> None:
    log = ScalingLog(tmp_path / "a" / "log.jsonl")
    assert log.note(decision(2))
    assert not log.note(decision(2, reason="still"))
    assert not log.note(decision(1, effect="none"))
    assert log.note(decision(2)), "it is news again after a calm"
    assert log.note(decision(3, pool="n"))
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == [2, 2, 3]
    assert [one["pool"] for one in log.latest(None, 2)] == ["m", "n"]
    assert [one["target"] for one in log.latest("m", 9)] == [2, 2]


def test_a_new_controller_reads_where_the_last_one_stopped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = ScalingLog(path)
    for target in range(2, 300):
        first.note(decision(target))
    path.open("a").write('{"half": ')
    second = ScalingLog(path)
    assert second.latest("m", 3) == first.latest("m", 3)
    second.note(decision(5))
    assert second.latest("m", 1)[0]["target"] == 5


def test_the_file_stays_small(tmp_path: Path) -> None:
    log = ScalingLog(tmp_path / "log.jsonl", most_bytes=2000)
    for target in range(200):
        log.note(decision(target))
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"log.jsonl", "log.jsonl.1"}
    assert max(sizes.values()) <= 2000


def test_a_file_that_cannot_be_written_costs_no_decision(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = ScalingLog(tmp_path / "file" / "log.jsonl")
    assert log.note(decision(2))
    assert log.latest(None, 1)
