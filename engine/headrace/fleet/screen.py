"""What `headrace serve` shows: progress while replicas start, the ready banner, what happens afterwards.

On a terminal a live table; elsewhere one line per change. Progress goes to stderr; stdout carries the `ready:`
line and the example, for people and for programs that wait for it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace.fleet.status import FleetStatus, PoolStatus, ReplicaStatus
from headrace.fleet.status_words import gateway_line
from headrace_router.types import ReplicaState

_COLOURS = {
    ReplicaState.READY: "green",
    ReplicaState.FAILED: "red",
    ReplicaState.DRAINING: "yellow",
}


_SILENCE_S = 15.0
"""Without a terminal, a start that has nothing new to tell says after so long that it still goes on."""

_SUMMARY_FROM = 4
"""So many replicas that do the same at once share one line."""


class Screen:
    """One `serve`'s output. Keeps the standard streams of the moment it is made."""

    def __init__(
        self,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out or sys.stdout
        self._clock = clock
        self._said_s = clock()
        self._console = Console(file=err or sys.stderr, highlight=False)
        self._live: Live | None = None
        self._shown: dict[str, tuple[str, str]] = {}
        self._restarts: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self._gateways: dict[str, str] = {}  # lines, by address of the node

    def say(self, line: str) -> None:
        """One line about what happens."""
        self._said_s = self._clock()
        self._console.print(Text(line), soft_wrap=True)

    def progress(self, status: FleetStatus) -> None:
        """The fleet while it starts."""
        if not self._console.is_terminal:
            self.changes(status)
            if self._clock() - self._said_s >= _SILENCE_S:
                late = [describe(replica) for replica in status.replicas if not replica.is_ready]
                late = late or ["looking at the cluster"]
                more = f" and {len(late) - 2} more" if len(late) > 2 else ""
                self.say(
                    f"still starting, {status.num_ready} of {len(status.replicas)} ready: "
                    f"{'; '.join(late[:2])}{more}"
                )
            return
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(_progress_table(status.replicas))

    def seen(self, status: FleetStatus) -> None:
        """The fleet as it is before anything happens: no news."""
        self._shown = {replica.id: _shown(replica) for replica in status.replicas}
        self._restarts = {replica.id: replica.restarts for replica in status.replicas}
        self._gateways = {gateway.address: gateway_line(gateway) for gateway in status.gateways}

    def changes(self, status: FleetStatus) -> None:
        """One line per replica whose state or phase is not what it was; one for all where many do the same."""
        for pool in status.pools:
            before = self._wanted.setdefault(pool.pool, pool.wanted)
            if before != pool.wanted:
                self._wanted[pool.pool] = pool.wanted
                self.say(f"{pool.pool}: {before} -> {pool.wanted} replicas, {pool.reason}")
        gateways = {gateway.address: gateway_line(gateway) for gateway in status.gateways}
        for address in sorted(self._gateways.keys() | gateways.keys()):
            line = gateways.get(address, f"gateway on {address}: gone")
            if self._gateways.get(address) != line:
                self.say(line)
        self._gateways = gateways
        for gone in self._shown.keys() - {replica.id for replica in status.replicas}:
            del self._shown[gone]
            self.say(f"{gone}: gone")
        changed: dict[tuple[str, str], list[ReplicaStatus]] = {}
        for replica in status.replicas:
            if replica.restarts > self._restarts.get(replica.id, 0):
                # It may have failed and come back between two looks.
                self.say(f"{replica.id}: {replica.last_failure}; started again")
            self._restarts[replica.id] = replica.restarts
            now = _shown(replica)
            if self._shown.get(replica.id) != now:
                self._shown[replica.id] = now
                changed.setdefault(now, []).append(replica)
        for same in changed.values():
            if len(same) >= _SUMMARY_FROM and same[0].state is not ReplicaState.FAILED:
                self.say(f"{same[0].id} and {len(same) - 1} more: {_doing(same[0])}")
                continue
            for replica in same:
                self.say(describe(replica))

    def end_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def ready(self, url: str, status: FleetStatus) -> None:
        """The banner. Waiting programs look for the line `ready: URL`."""
        command = _own_command()
        self.end_progress()
        self._shown = {replica.id: (replica.state.value, "") for replica in status.replicas}
        self._wanted = {pool.pool: pool.wanted for pool in status.pools}
        self._gateways = {gateway.address: gateway_line(gateway) for gateway in status.gateways}
        awake = sorted({replica.model for replica in status.replicas})
        models = sorted({*awake, *(pool.model for pool in status.pools)})
        if awake:
            count = "1 replica serves" if status.num_ready == 1 else f"{status.num_ready} replicas serve"
            self.say(f"{count} {', '.join(awake)}")
        asleep = [model for model in models if model not in awake]
        if asleep:
            self.say(
                f"no replica of {', '.join(asleep)} runs yet; the first request starts one and waits for it"
            )
        body = json.dumps(
            {"model": models[0] if models else "", "messages": [{"role": "user", "content": "Hi"}]}
        )
        print(f"ready: {url}", file=self._out)
        for gateway in status.gateways:
            print(f"also:  {gateway.url}", file=self._out)
        print(
            f"try:   curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
            file=self._out,
        )
        print(
            f"see:   {command} status; {command} explain; Ctrl-C ends it",
            file=self._out,
            flush=True,
        )


_STARTING = (ReplicaState.PENDING, ReplicaState.STARTING)


def _shown(replica: ReplicaStatus) -> tuple[str, str]:
    return replica.state.value, replica.phase if replica.state in _STARTING else ""


def describe(replica: ReplicaStatus) -> str:
    """`smollm2-unified-0: starting, engine (12 s)`."""
    pid = f", pid {replica.pid}" if replica.is_ready and replica.start_s else ""
    return f"{replica.id}: {_doing(replica)}{pid}"


def _doing(replica: ReplicaStatus) -> str:
    if replica.state in _STARTING and replica.reason and not replica.phase:
        return f"{replica.state.value}, {replica.reason} ({replica.state_s:.0f} s)"
    if replica.state in _STARTING:
        return f"{replica.state.value}, {replica.phase or 'waiting for a place'} ({replica.state_s:.0f} s)"
    if replica.is_ready and replica.start_s:
        return f"ready after {replica.start_s:.0f} s"
    if replica.state is ReplicaState.FAILED:
        if replica.is_external:
            return replica.reason
        then = "not started again" if replica.has_given_up else "to be started again"
        return f"failed, {replica.reason}; {then}"
    return replica.state.value


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


def _own_command() -> str:
    """How to call `headrace` from where the user is: by its name where PATH has it, else by its path."""
    own = Path(sys.argv[0])
    if own.name != "headrace":  # python -m headrace.cli
        return "headrace"
    found = shutil.which("headrace")
    if found is not None and Path(found).resolve() == own.resolve():
        return "headrace"
    here = Path.cwd()
    return str(own.absolute().relative_to(here) if own.absolute().is_relative_to(here) else own.absolute())


def status_table(status: FleetStatus, url: str, is_ready: bool = True) -> Table:
    """The table of `headrace status`. A gateway that is not ready does not listen yet."""
    where = f" at {url}" if is_ready else f", starting; will be at {url}"
    title = f"fleet {status.fleet}" + (where if url else "")
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


def pool_table(pools: Iterable[PoolStatus]) -> Table:
    """How many replicas each pool should have, and why."""
    table = Table(box=None, pad_edge=False)
    table.add_column("pool")
    for heading in ("ready", "target", "min", "max"):
        table.add_column(heading, justify="right")
    table.add_column("why", overflow="fold")
    for pool in pools:
        table.add_row(
            pool.pool,
            str(pool.ready),
            f"{pool.wanted} (pinned)" if pool.pin is not None else str(pool.target),
            "-" if pool.least is None else str(pool.least),
            "-" if pool.most is None else str(pool.most),
            pool.reason,
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
