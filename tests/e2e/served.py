"""One `headrace serve` as a user starts it: a process, its lines, its end."""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.fleet import warden

CLI = [sys.executable, "-m", "headrace.cli"]


class Served:
    """A process whose lines can be waited for. stdout and stderr are read as one."""

    def __init__(
        self,
        config: Path,
        *arguments: str,
        inside: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`inside`: what to put before its commands. `environment`: instead of our own."""
        name, value = "HEADRACE_TEST_RUN", secrets.token_hex(8)
        self.mark = f"{name}={value}"
        # Its own place to be found at: `status` must not meet a fleet that the user runs.
        self._found_at = tempfile.TemporaryDirectory()
        environment = os.environ if environment is None else environment
        self._environment = {**environment, name: value, "XDG_RUNTIME_DIR": self._found_at.name}
        self._cli = [*inside, *CLI]
        self.process = subprocess.Popen(
            [*self._cli, "serve", str(config), *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # as a shell's job: a Ctrl-C reaches its whole process group
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        """Where it serves. Waits until it is ready."""
        return self.wait_line(r"^ready: (\S+)$", timeout_s=280)[1]

    def wait_line(self, pattern: str, timeout_s: float = 120, after: int = 0) -> re.Match[str]:
        """The first line from number `after` on that matches. Raises AssertionError with what was said instead."""
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            number = after
            while True:
                while number < len(self.lines):
                    if found := re.search(pattern, self.lines[number]):
                        return found
                    number += 1
                left_s = deadline_s - time.monotonic()
                assert left_s > 0 and not self._ended, f"no line {pattern!r} in:\n" + "\n".join(self.lines)
                self._news.wait(left_s)

    def status(self, *options: str) -> dict[str, Any]:
        """What `headrace status --json` says of it."""
        status: dict[str, Any] = json.loads(self.command("status", "--json", *options))
        return status

    def command(self, *words: str) -> str:
        """What a `headrace` command prints of this fleet."""
        done = subprocess.run(
            [*self._cli, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def beside(self, *words: str) -> subprocess.Popen[str]:
        """A `headrace` command that runs beside it; its output can be read: stdout and stderr as one."""
        return subprocess.Popen(
            [*self._cli, *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, signum: int = signal.SIGTERM, *, whole_group: bool = False, timeout_s: float = 60) -> int:
        """Signal it and return its exit code, once every line has been read."""
        if whole_group:
            os.killpg(self.pid, signum)
        else:
            self.process.send_signal(signum)
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def left_behind(self) -> list[int]:
        """Processes that carry this run's mark, its own included while it lives."""
        return warden.marked(self.mark)

    def cleanup(self) -> None:
        """After its end: remove what it could be found by."""
        self._found_at.cleanup()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


@contextmanager
def serving(config: Path, *arguments: str, **where: Any) -> Iterator[Served]:
    """A `Served` that is gone afterwards, whatever happened."""
    served = Served(config, *arguments, **where)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.terminate()
            try:
                served.process.wait(30)
            except subprocess.TimeoutExpired:
                served.process.kill()
        warden.end_all(served.mark, grace_s=5)
        for line in served.lines:
            if line.startswith("logs: "):  # kept because something failed, as tests make things do
                shutil.rmtree(Path(line.removeprefix("logs: ")).parent, ignore_errors=True)
        served.cleanup()


def ends(pid: int, timeout_s: float = 10) -> Callable[[], bool]:
    """Call before a process is to end; the returned function waits for its end and says whether it came."""
    descriptor = os.pidfd_open(pid)

    def wait() -> bool:
        try:
            return bool(select.select([descriptor], [], [], timeout_s)[0])
        finally:
            os.close(descriptor)

    return wait
