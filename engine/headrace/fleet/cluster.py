"""The Ray cluster: one of our own on this machine, or one that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import FatalStartError, StartError
from headrace.fleet import warden

RUN_MARK = "HEADRACE_RUN"
"""Environment variable that every process of a local fleet inherits, Ray's and vLLM's included."""

_OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Ray's least is 75 MiB; nothing of ours passes through the object store."""

_MARK_GRACE_S = 5.0

_VERSIONS = re.compile(
    r"Version mismatch.*?(Ray: \S+)\s+(Python: \S+).*?(Ray: \S+)\s+(Python: \S+)", re.DOTALL
)
"""Ray's words for a cluster of other versions than this process: first its, then ours."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A connected driver. `auth_token` is what others need to connect, None where they must know it themselves."""

    address: str
    is_local: bool
    mark: str = ""
    auth_token: str | None = None
    session: Path | None = None  # Ray's folder of logs and sockets, of a cluster of our own
    warden: subprocess.Popen[bytes] | None = None  # over a cluster of our own
    is_adopted: bool = False  # somebody else in this process has connected it, and will disconnect it


def connected() -> Connection | None:
    """The cluster that somebody else in this process has connected to (a notebook's `ray.init()`), None without."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return Connection(ray.get_runtime_context().gcs_address, is_local=False, is_adopted=True)


def start_local(*, takes_stdout: bool = True) -> Connection:
    """Start Ray on this machine, for this process alone. Blocks about 3 s. Raises StartError.

    Everybody who reaches Ray's ports could run code here, so a random token is asked for unless the user has
    settled Ray's authentication by the environment, or Ray has been imported already: it reads its mode then, and a
    cluster that asks for a token would refuse this very process.

    `takes_stdout`: see `join`.
    """
    mark = secrets.token_hex(16)
    if "ray" not in sys.modules and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Later the mode may be Ray's own choice, which it writes into the environment, with a token of its file.
    token = os.environ.get("RAY_AUTH_TOKEN")
    # Ray ends most of its processes when this one is killed, but not its dashboard's agents.
    watching = warden.post(f"{RUN_MARK}={mark}")
    os.environ[RUN_MARK] = mark
    os.environ[warden.KEEPS_ENVIRONMENT] = "1"
    try:
        context = _init(
            takes_stdout,
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
    except StartError:
        warden.end_all(f"{RUN_MARK}={mark}", 0.0)
        watching.kill()
        watching.wait()
        raise
    finally:
        # Ray's own processes pass it on. What this process starts later (a notebook's commands) is not the fleet's.
        del os.environ[RUN_MARK]
    info = context.address_info
    session = Path(info["session_dir"])
    return Connection(info["address"], True, f"{RUN_MARK}={mark}", token, session, warden=watching)


def join(
    address: str, auth_token: str | None = None, timeout_s: float = 30.0, *, takes_stdout: bool = True
) -> Connection:
    """Connect to a running cluster. Raises StartError when it does not answer within `timeout_s`.

    `auth_token` counts only where this process has not imported Ray yet. `takes_stdout`: Ray's driver prints each
    worker's death, in a long paragraph, to whatever `sys.stdout` is at that moment. A command keeps the real one for
    itself (`Screen` does) and lets go of the name; in a program that others write it stays theirs.
    """
    if auth_token is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = auth_token
    outcome: Future[Any] = Future()

    def connect() -> None:
        try:
            outcome.set_result(_init(takes_stdout, address=address))
        except StartError as error:
            outcome.set_exception(error)

    # Ray itself tries for minutes, without a way to leave, at an address where nothing runs or the token is wrong.
    threading.Thread(target=connect, daemon=True).start()
    try:
        context = outcome.result(timeout_s)
    except TimeoutError:
        raise StartError(
            f"the Ray cluster at {address} did not answer in {timeout_s:g} s; is it running, and is its token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token?"
        ) from None
    return Connection(context.address_info["address"], False)


def leave(connection: Connection | None, *, shared: Collection[int] = (), keep_logs: bool = False) -> None:
    """Disconnect; end our own cluster, wait until none of its processes is left, remove its folder in /tmp.

    Blocks for some seconds. `shared`: shared memory that the fleet had, see `warden.shared_memory`. `keep_logs`
    leaves the folder, for people who look for the cause of a failure.
    """
    import ray

    if connection is not None and connection.is_adopted:
        return
    ray.shutdown()
    if connection is None or not connection.mark:
        return
    warden.end_all(connection.mark, _MARK_GRACE_S, shared)
    if connection.warden is not None:
        connection.warden.kill()
        connection.warden.wait()
    session = connection.session
    if session is not None and not keep_logs:
        shutil.rmtree(session, ignore_errors=True)
        latest = session.parent / "session_latest"
        if latest.is_symlink() and latest.readlink().name == session.name:
            latest.unlink(missing_ok=True)


def _init(takes_stdout: bool, **arguments: Any) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise FatalStartError("Ray is not installed; `pip install headrace[ray]`") from error
    if takes_stdout:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process's life
    try:
        with _minimal_agents():
            return ray.init(
                namespace="headrace",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                ignore_reinit_error=False,
                **arguments,
            )
    except Exception as error:  # Ray raises many kinds here; all mean that there is no cluster
        where = arguments.get("address")
        what = "start Ray on this machine" if where == "local" else f"join the Ray cluster at {where}"
        if versions := _VERSIONS.search(str(error)):
            words = [word.replace(": ", " ") for word in versions.groups()]
            there, here = " and ".join(words[:2]), " and ".join(words[2:])
            raise FatalStartError(
                f"cannot {what}: it runs {there}, this process {here}; install one version everywhere"
            ) from error
        raise StartError(f"cannot {what}: {_first_line(error)}") from error


@contextlib.contextmanager
def _minimal_agents() -> Iterator[None]:
    """Ray's agents as they are where `ray[serve]` is not installed, for the clusters that start meanwhile.

    Installing it makes every start bring up the dashboard's agent in full, `include_dashboard` or not: more CPU at the
    start, more memory for good, for pages that nobody can open. There is no switch for it, so Ray is told what it
    would find without.
    """
    try:
        from ray._private import utils

        ask = utils.get_dashboard_dependency_error
    except (ImportError, AttributeError):  # another Ray, which does as it likes
        yield
        return
    utils.get_dashboard_dependency_error = lambda: ImportError("headrace has no use for the dashboard")
    try:
        yield
    finally:
        utils.get_dashboard_dependency_error = ask


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]
