"""Why vLLM's engine did not start, in one line.

What it raises in this process says so; what its engine processes raise it does not hand on ("see root cause
above"), but their stderr is ours, and under Ray that is a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.backends.vllm_arguments import EngineSettings
from headrace.errors import FatalStartError, StartError


@contextmanager
def start_reasons(settings: EngineSettings) -> Iterator[None]:
    """Turn what vLLM raises while the engine starts into one line."""
    log_start = _log_size()
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:  # pydantic's ValidationError is a ValueError
        raise FatalStartError(f"vLLM refuses {settings.path}: {_one_line(str(error))}") from error
    except Exception as error:  # whatever an engine's start may raise: the host decides whether to try again
        cause = _last_error_in_log(log_start)
        reason = cause or _one_line(str(error)) or type(error).__name__
        family = FatalStartError if cause and cause.startswith(("ValueError", "OSError")) else StartError
        raise family(f"the engine of {settings.model!r} did not start: {reason}") from error


def _one_line(text: str) -> str:
    """A pydantic report's "Value error, ..." line, else the first line; at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else "")
    return re.sub(r" \[type=.*", "", told.removeprefix("Value error, "))[:300]


def _log_size() -> int:
    """Bytes so far in the file behind stderr, -1 where that is no file. Engine processes write there too."""
    try:
        return os.fstat(2).st_size if Path(os.readlink("/proc/self/fd/2")).is_file() else -1
    except OSError:
        return -1


def _last_error_in_log(start: int) -> str | None:
    """The engine processes' own complaint: vLLM only says "see root cause above", which is in the log."""
    if start < 0:
        return None
    try:
        with open(os.readlink("/proc/self/fd/2"), "rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
    except OSError:
        return None
    found = re.findall(r"\b((?:[A-Za-z_.]*(?:Error|Exception)): (?!Engine core initialization).+)", text)
    return found[-1][:300] if found else None
