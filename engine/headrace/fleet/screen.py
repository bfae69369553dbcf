"""What `headrace serve` shows: progress while replicas start, the ready banner, what happens afterwards.

On a terminal a live table; elsewhere one line per change. Progress goes to stderr; stdout carries the `ready:`
line and the example, for people and for programs that wait for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace.fleet.status import FleetStatus, ReplicaStatus
from headrace_router.types import ReplicaState

_COLOURS = {
    ReplicaState.READY: "green",
    ReplicaState.FAILED: "red",
    ReplicaState.DRAINING: "yellow",
}


class Screen:
    """One `serve`'s output. Keeps the standard streams of the moment it is made."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._console = Console(file=err or sys.stderr, highlight=False)
        self._live: Live | None = None
        self._shown: dict[str, tuple[str, str]] = {}
        self._restarts: dict[str, int] = {}

    def say(self, line: str) -> None:
        """One line about what happens."""
        self._console.print(Text(line), soft_wrap=True)

    def progress(self, status: FleetStatus) -> None:
        """The fleet while it starts."""
        if not self._console.is_terminal:
            self.changes(status)
            return
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(_progress_table(status.replicas))

    def changes(self, status: FleetStatus) -> None:
        """One line per replica whose state or phase is not what it was."""
        for replica in status.replicas:
            if replica.restarts > self._restarts.get(replica.id, 0):
                # It may have failed and come back between two looks.
                self.say(f"{replica.id}: {replica.reason}; started again")
            self._restarts[replica.id] = replica.restarts
            now = (replica.state.value, replica.phase if replica.state in _STARTING else "")
            if self._shown.get(replica.id) != now:
                self._shown[replica.id] = now
                self.say(describe(replica))

    def end_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def ready(self, url: str, status: FleetStatus) -> None:
        """The banner. Waiting programs look for the line `ready: URL`."""
        self.end_progress()
        self._shown = {replica.id: (replica.state.value, "") for replica in status.replicas}
        models = sorted({replica.model for replica in status.replicas})
        self.say(f"{status.num_ready} replicas serve {', '.join(models)}")
        body = json.dumps(
            {"model": models[0] if models else "", "messages": [{"role": "user", "content": "Hi"}]}
        )
        print(f"ready: {url}", file=self._out)
        print(
            f"try:   curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
            file=self._out,
            flush=True,
        )


_STARTING = (ReplicaState.PENDING, ReplicaState.STARTING)


def describe(replica: ReplicaStatus) -> str:
    """`smollm2-unified-0: starting, engine (12 s)`."""
    if replica.state in _STARTING:
        doing = replica.phase or "waiting for a place"
        return f"{replica.id}: {replica.state.value}, {doing} ({replica.state_s:.0f} s)"
    if replica.state is ReplicaState.READY and replica.start_s:
        return f"{replica.id}: ready after {replica.start_s:.0f} s, pid {replica.pid}"
    if replica.state is ReplicaState.FAILED:
        if replica.is_external:
            return f"{replica.id}: {replica.reason}"
        then = "not started again" if replica.has_given_up else "to be started again"
        return f"{replica.id}: failed, {replica.reason}; {then}"
    return f"{replica.id}: {replica.state.value}"


def _progress_table(replicas: Iterable[ReplicaStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("replica", "state", "phase", "seconds", ""):
        table.add_column(heading)
    for replica in replicas:
        table.add_row(
            replica.id,
            _state(replica),
            replica.phase,
            f"{replica.start_s or replica.state_s:.0f}",
            replica.reason,
        )
    return table


def status_table(status: FleetStatus, url: str) -> Table:
    """The table of `headrace status`."""
    title = f"fleet {status.fleet}" + (f" at {url}" if url else "")
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in ("replica", "model", "role", "state"):
        table.add_column(heading)
    for heading in ("running", "waiting", "KV use", "uptime", "restarts"):
        table.add_column(heading, justify="right")
    table.add_column("node")
    table.add_column("reason")
    for replica in status.replicas:
        table.add_row(
            replica.id,
            replica.model,
            replica.role.value,
            _state(replica),
            "-" if replica.running is None else str(replica.running),
            "-" if replica.waiting is None else str(replica.waiting),
            "-" if replica.kv_use is None else f"{replica.kv_use:.0%}",
            duration(replica.state_s) if replica.state is ReplicaState.READY else "-",
            str(replica.restarts),
            "external" if replica.is_external else replica.node,
            replica.reason,
        )
    return table


def _state(replica: ReplicaStatus) -> Text:
    return Text(replica.state.value, style=_COLOURS.get(replica.state, ""))


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h05m`, `3d04h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02d}h"
