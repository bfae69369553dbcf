"""What is wrong with a configuration, in one line a person can act on: key path, value, bound."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from headrace.config_file import KeyPath

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "a string (put quotes around it)",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}
BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
PHRASES = {
    "string_pattern_mismatch": "of the form {pattern}",
    "string_too_short": "at least {min_length} character long",
    "string_too_long": "at most {max_length} characters long",
    "too_short": "a list of at least {min_length}",
    "finite_number": "a finite number",
    "time_zone": "the name of a time zone: UTC, Europe/Berlin",
    "host_form": "an IP address or a host name, without scheme and port",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that cannot be, and where it stands."""

    path: KeyPath
    message: str

    def __str__(self) -> str:
        return self.message


def dotted(path: Sequence[str | int]) -> str:
    """``models[0].pools[1].replicas``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "the configuration"


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'policy'?``, or the known words when none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def describe(root: type[BaseModel], error: ValidationError) -> tuple[Problem, ...]:
    """Every problem that pydantic found, in the order of the tree, one for each key."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and detail["input"]:
            continue  # the list is not short; pydantic counts only its valid members, whose faults stand here too
        grouped.setdefault(_key_path(root, detail), []).append(detail)
    return tuple(Problem(path, _message(root, path, details)) for path, details in grouped.items())


def _message(root: type[BaseModel], path: KeyPath, details: Sequence[ErrorDetails]) -> str:
    detail = details[0]
    if detail["type"] == "extra_forbidden":
        *parent, key = path
        known = list(_fields_at(root, tuple(parent)))
        return f"unknown key {str(key)!r} in {dotted(parent)}{nearest(str(key), known)}"
    if detail["type"] == "missing":
        return f"{dotted(path)} is missing"
    demands = " or ".join(dict.fromkeys(_demand(each) for each in _tell(details)))
    value = "(not shown)" if path[-1:] == ("api_key",) else _short(detail["input"])
    return f"{dotted(path)} is {value}; it must be {demands}"


def _tell(details: Sequence[ErrorDetails]) -> Sequence[ErrorDetails]:
    """Of the several errors of an either-or field, those about the alternative that the value tried to be."""
    bounds = [detail for detail in details if detail["type"] in BOUNDS]
    return bounds or details


def _demand(detail: ErrorDetails) -> str:
    kind: str = detail["type"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return f"{words} {_number(context[name])}"
    if kind in ("literal_error", "enum"):
        return _one_of(str(context["expected"]), detail["input"])
    if kind in PHRASES:
        return PHRASES[kind].format_map(context)
    stem = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    return KINDS.get(stem, f"otherwise ({detail['msg']})")


def _number(bound: object) -> str:
    """`1`, not `1.0`: pydantic keeps the bounds of a field that may be an integer or a word as floats."""
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)


def _one_of(expected: str, value: object) -> str:
    words = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    close = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return expected + (f" (did you mean {close[0]!r}?)" if close else "")


def _short(value: object) -> str:
    """As YAML would write it, or nearly, and not too long."""
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _key_path(root: type[BaseModel], detail: ErrorDetails) -> KeyPath:
    """The path without the steps that pydantic adds for the alternatives of an either-or field."""
    path: list[str | int] = []
    annotation: object = root
    for step in detail["loc"]:
        if _is_either_or(annotation):
            break
        path.append(step)
        annotation = _child(annotation, step)
    return tuple(path)


def _fields_at(root: type[BaseModel], path: KeyPath) -> Iterator[str]:
    annotation: object = root
    for step in path:
        annotation = _child(annotation, step)
    bare = _bare(annotation)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        yield from (field.alias or name for name, field in bare.model_fields.items())


def _child(annotation: object, step: str | int) -> object:
    bare = _bare(annotation)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        fields = {field.alias or name: field for name, field in bare.model_fields.items()}
        field = fields.get(str(step))
        return field.annotation if field else None
    if get_origin(bare) in (tuple, list):
        return get_args(bare)[0]
    if get_origin(bare) is dict:
        return get_args(bare)[1]
    return None


def _bare(annotation: object) -> object:
    """Without `Annotated` and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [each for each in get_args(annotation) if each is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _is_either_or(annotation: object) -> bool:
    return get_origin(_bare(annotation)) in (Union, types.UnionType)
