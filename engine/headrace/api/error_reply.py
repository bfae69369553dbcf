"""A server's refusal as the exception that it was there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from headrace.errors import BadRequest, CallerError, HeadraceError, ShortageError


def error_of(status: int, body: bytes, retry_after_s: float | None = None) -> HeadraceError:
    """What an answer of `status` (400 and above) means: the class with its code, else that with its status, else a
    CallerError below 500 and a ShortageError from there on; `status` is always the server's."""
    told: Mapping[str, Any] = {}
    try:
        read = json.loads(body)
        told = read.get("error") or read if isinstance(read, dict) else {}
        told = told if isinstance(told, dict) else {"message": told}
    except ValueError:
        pass
    message = str(told.get("message") or body[:300].decode(errors="replace") or f"HTTP {status}")
    kind = _kind(status, told.get("code"))
    param = told.get("param")
    error: HeadraceError
    if issubclass(kind, ShortageError):
        error = kind(message, retry_after_s=1.0 if retry_after_s is None else retry_after_s, param=param)
    else:
        error = kind(message, param=param)
    error.status = status
    return error


def _kind(status: int, code: object) -> type[HeadraceError]:
    known = list(_kinds(HeadraceError))
    for kind in known:
        if kind.code is not None and kind.code == code:
            return kind
    if status == 400:
        return BadRequest
    for kind in known:
        if kind.status == status and "status" in vars(kind):
            return kind
    return CallerError if status < 500 else ShortageError


def _kinds(kind: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
    for narrower in kind.__subclasses__():
        yield narrower
        yield from _kinds(narrower)
