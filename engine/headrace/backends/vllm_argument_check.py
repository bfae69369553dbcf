"""Engine arguments judged by vLLM's own parser and the bounds of its own configuration classes, before any start.

`faults` runs this file as a program: importing vLLM takes seconds and prints what it likes, and a caller that only
checks a file should keep neither. The program reads a list of argument mappings from stdin and writes for each a
mapping of the names at fault to what is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import operator
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import StartError

_TIMEOUT_S = 120.0
_BOUNDS = (
    ("ge", operator.ge, "at least"),
    ("gt", operator.gt, "more than"),
    ("le", operator.le, "at most"),
    ("lt", operator.lt, "less than"),
)
"""As annotated-types, which pydantic keeps in a field's metadata, names them."""


def can_check() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def faults(arguments: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each mapping its names at fault. Blocks for 10 to 20 s. Raises StartError when vLLM cannot be asked."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "headrace.backends.vllm_argument_check"],
            input=json.dumps(arguments),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        told: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
        return told
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise StartError(
            "vLLM is installed but could not be asked; is `python -c 'import vllm'` all right?"
        ) from error


def _judge(arguments: Mapping[str, Any]) -> dict[str, str]:
    told = ((name, _fault(name.replace("-", "_"), value)) for name, value in arguments.items())
    return {name: fault for name, fault in told if fault}


def _fault(name: str, value: Any) -> str | None:
    """Each argument alone, so that each gets its answer; argparse stops at the first fault."""
    from headrace.backends.vllm_arguments import EngineSettings, parse
    from headrace.errors import FatalStartError

    try:
        namespace = parse(EngineSettings("m", "org/m", {name: value}))
    except FatalStartError as error:
        return error.message.removeprefix("pools[].engine of model 'm': ")
    return _out_of_bounds(name, getattr(namespace, name, None))


def _out_of_bounds(name: str, value: Any) -> str | None:
    """What vLLM's parser lets pass and its configuration classes do not."""
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig

    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    for kind in (ModelConfig, CacheConfig, ParallelConfig, SchedulerConfig):
        field = kind.__pydantic_fields__.get(name)
        for constraint in field.metadata if field is not None else ():
            for attribute, holds, words in _BOUNDS:
                bound = getattr(constraint, attribute, None)
                if bound is not None and not holds(value, bound):
                    return f"{name} is {value!r}; it must be {words} {bound}"
    return None


if __name__ == "__main__":
    answer = json.dumps([_judge(each) for each in json.load(sys.stdin)])
    print(f"\n{answer}", flush=True)
