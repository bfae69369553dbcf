"""Where the fleets of this machine tell `headrace status` how to reach them: one small file per `serve`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.backends.embedded_model import cache_root


@dataclass(frozen=True, slots=True)
class Run:
    """One running fleet: a `headrace serve`, or a Python program that has opened one."""

    pid: int
    began: str | None  # of the process, see `began`
    fleet: str
    url: str
    ray_address: str
    auth_token: str | None  # of its Ray cluster, None where the environment must say
    num_cores: float = 0.0  # of this machine that its replicas compute on
    is_ready: bool = False


def of_this_process(fleet: str, url: str, ray_address: str, auth_token: str | None, num_cores: float) -> Run:
    """Not ready yet."""
    pid = os.getpid()
    return Run(pid, began(pid), fleet, url, ray_address, auth_token, num_cores)


def folder() -> Path:
    """Readable by this user alone: the files hold tokens."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) / "headrace" if os.path.isabs(runtime) else cache_root() / "run"


@contextlib.contextmanager
def announced(run: Run) -> Iterator[None]:
    """Be found for as long as the context lasts."""
    path = _path(run)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write(run)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def write(run: Run) -> None:
    """Say it anew, for a run that is announced."""
    unfinished = _path(run).with_suffix(".part")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(run), file)
    unfinished.rename(_path(run))


def _path(run: Run) -> Path:
    return folder() / f"{run.pid}.json"


def running() -> list[Run]:
    """Fleets of this user that run on this machine now; files of killed ones are removed."""
    runs = []
    for path in sorted(folder().glob("*.json")) if folder().is_dir() else []:
        try:
            run = Run(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if run.began == began(run.pid):
            runs.append(run)
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(".stderr").unlink(missing_ok=True)  # see `raw_output`
    return runs


def began(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None when there is none. Tells it from one whose number it got."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]  # field 22; the name before may hold spaces
