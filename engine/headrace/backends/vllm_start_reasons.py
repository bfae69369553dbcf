"""Why vLLM's engine did not start, in one line.

What it raises in this process says so; what its engine processes raise it does not hand on ("see root cause
above"), but their stderr is ours, and under Ray that is a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.backends import cache_size, vllm_start_phases
from headrace.backends.vllm_arguments import EngineSettings
from headrace.backends.vllm_start_phases import STDERR
from headrace.errors import FatalStartError, StartError


@contextmanager
def start_reasons(settings: EngineSettings) -> Iterator[None]:
    """Turn what vLLM raises while the engine starts into one line."""
    log_start = vllm_start_phases.size(STDERR)
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:  # pydantic's ValidationError is a ValueError
        raise FatalStartError(f"vLLM refuses {settings.path}: {explained(str(error), settings)}") from error
    except Exception as error:  # whatever an engine's start may raise: the host decides whether to try again
        cause = _last_error_in_log(log_start)
        reason = explained(cause or str(error), settings) or type(error).__name__
        family = FatalStartError if cause and cause.startswith(("ValueError", "OSError")) else StartError
        raise family(f"the engine of {settings.model!r} did not start: {reason}") from error


def explained(text: str, settings: EngineSettings) -> str:
    """vLLM's complaint in one line, with what to do where vLLM speaks of something that is set elsewhere here."""
    told = _one_line(text)
    if "GiB KV cache is needed" in text or "No available memory for the cache blocks" in text:
        given = settings.arguments.get("kv_cache_memory_bytes")
        least = cache_size.least_bytes(Path(settings.path), settings.arguments)
        if isinstance(given, int) and least is not None and given < least[0]:
            return f"pools[].engine.{cache_size.complaint(given, *least)}"
        first, _, _ = told.removeprefix("ValueError: ").partition(" Try increasing")
        key = (
            "kv_cache_memory_bytes"
            if given is not None
            else "gpu_memory_utilization or kv_cache_memory_bytes"
        )
        return f"{first} Raise pools[].engine.{key}, or lower max_model_len"
    if re.search(
        r"couldn't connect to|Connection ?Error|offline mode|LocalEntryNotFound", text, re.IGNORECASE
    ):
        return (
            f"{told.rstrip('.')}; is this machine offline? Set models[].source to a folder with the model, or fetch "
            f"it where there is a network: `hf download {settings.path}`"
        )
    if re.search(r"not a valid model identifier|Repository Not Found|404 Client Error", text):
        return f"{told.rstrip('.')}; check models[].source; a private or gated model needs HF_TOKEN to be set"
    return told


def _one_line(text: str) -> str:
    """A pydantic report's "Value error, ..." line, else the first line; at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else "")
    return re.sub(r" \[type=.*", "", told.removeprefix("Value error, "))[:300]


def _last_error_in_log(start: int) -> str | None:
    """The engine processes' own complaint: vLLM only says "see root cause above", which is in the log."""
    path = vllm_start_phases.path(STDERR)
    if path is None:
        return None
    try:
        with open(path, "rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
    except OSError:
        return None
    found = re.findall(r"\b((?:[A-Za-z_.]*(?:Error|Exception)): (?!Engine core initialization).+)", text)
    return found[-1][:300] if found else None
