"""How `headrace status` finds the fleets of this machine."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.fleet import run_file
from headrace.fleet.controller_call import NothingRuns, pick
from headrace.fleet.preflight import holding_cores
from headrace.fleet.run_file import Run

A = Run(os.getpid(), run_file.began(os.getpid()), "headrace", "http://127.0.0.1:8000", "ray:1", None, 2.0)
B = replace(A, pid=A.pid + 1, url="http://127.0.0.1:8001", num_cores=0.0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_fleet_is_found_while_it_starts_and_until_it_ends() -> None:
    with run_file.announced(A):
        assert run_file.running() == [A]
        run_file.write(replace(A, is_ready=True))
        assert [run.is_ready for run in run_file.running()] == [True]
    assert run_file.running() == []


def test_what_a_killed_serve_left_is_removed() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = replace(A, pid=ended.pid, began="1")
    run_file.folder().mkdir(parents=True)
    run_file.write(gone)
    (run_file.folder() / f"{gone.pid}.stderr").write_text("raw")
    assert run_file.running() == []
    assert list(run_file.folder().iterdir()) == []


def test_two_fleets_of_one_name_are_told_apart_by_url_or_pid() -> None:
    assert pick([A, B], None, "http://127.0.0.1:8001/", None) is B
    assert pick([A, B], None, "127.0.0.1:8000", None) is A
    assert pick([A, B], "headrace", None, B.pid) is B
    with pytest.raises(NothingRuns) as caught:
        pick([A, B], "headrace", None, None)
    for told in (A.url, B.url, str(A.pid), str(B.pid), "--url", "--pid"):
        assert told in caught.value.message


def test_only_other_fleets_that_compute_here_are_warned_of() -> None:
    other = replace(B, num_cores=1.0)
    assert holding_cores([A, B, other]) == [other]
