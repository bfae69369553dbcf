"""Serve large language models from Python:

    from headrace import Fleet

    with Fleet.from_config("configs/local.yaml") as fleet:
        print(fleet.chat("What is the capital of France?").text)

`import headrace` itself imports nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.api.answer import Answer as Answer
    from headrace.api.answer import Usage as Usage
    from headrace.api.fleet import Fleet as Fleet
    from headrace.api.streams import AsyncTextStream as AsyncTextStream
    from headrace.api.streams import TextStream as TextStream

_PLACES = {
    "Fleet": "headrace.api.fleet",
    "Answer": "headrace.api.answer",
    "Usage": "headrace.api.answer",
    "TextStream": "headrace.api.streams",
    "AsyncTextStream": "headrace.api.streams",
}

__all__ = ["Answer", "AsyncTextStream", "Fleet", "TextStream", "Usage"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
