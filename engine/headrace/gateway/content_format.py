"""Whether a chat template expects a message's content as one string or as a list of parts.

vLLM decides it from the template's syntax tree (`--chat-template-content-format auto`, renderers/hf.py): a loop over
some message's content means parts. The same question is asked here of the same tree; the answer changes the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

from headrace.gateway.chat_template import sandbox

if TYPE_CHECKING:
    from jinja2 import nodes


class ContentFormat(StrEnum):
    """vLLM's own two words for it."""

    STRING = "string"
    PARTS = "openai"


def detect(template: str) -> ContentFormat:
    """STRING also where the tree holds what the search cannot follow (a loop that unpacks, say), as in vLLM."""
    root = sandbox().parse(template)
    try:
        return ContentFormat.PARTS if _loops_over_content(root) else ContentFormat.STRING
    except _Unfollowable:
        return ContentFormat.STRING


class _Unfollowable(Exception):
    """An assignment or a loop over messages whose target is not a plain name."""


def _loops_over_content(root: nodes.Template) -> bool:
    from jinja2 import nodes

    messages = _message_names(root)
    inside_macros: set[int] = set()
    parameters: dict[
        int, set[str]
    ] = {}  # of a loop in a macro: parameters that receive some message's content
    for macro in root.find_all(nodes.Macro):
        receiving = _content_parameters(root, macro, messages)
        for loop in macro.find_all(nodes.For):
            inside_macros.add(id(loop))
            if receiving:
                parameters[id(loop)] = receiving
    for loop in root.find_all(nodes.For):
        over = loop.iter
        if not any(_reads(over, name, "content") for name in messages):
            if not isinstance(over, nodes.Name):
                continue
            is_parameter = over.name in parameters.get(id(loop), ())
            if not is_parameter and (over.name != "content" or id(loop) in inside_macros):
                continue
        _name_of(loop.target)
        return True
    return False


def _content_parameters(root: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    """Parameters of a macro that somewhere is called with a message's content."""
    from jinja2 import nodes

    names = [argument.name for argument in macro.args]
    receiving: set[str] = set()
    for call in root.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        given: list[tuple[str, nodes.Node]] = list(zip(names, call.args, strict=False))
        given += [(pair.key, pair.value) for pair in call.kwargs if pair.key in names]
        receiving |= {
            name for name, value in given if any(_reads(value, message, "content") for message in messages)
        }
    return receiving


def _message_names(root: nodes.Template) -> list[str]:
    """Loop variables that run over `messages` or over a name that stands for (part of) it."""
    from jinja2 import nodes

    lists = list(_aliases(root, "messages"))
    return [
        _name_of(loop.target)
        for loop in root.find_all(nodes.For)
        if any(_reads(loop.iter, name) for name in lists)
    ]


def _aliases(root: nodes.Template, name: str) -> Iterator[str]:
    from jinja2 import nodes

    yield name
    for assignment in root.find_all(nodes.Assign):
        if _reads(assignment.node, name):
            alias = _name_of(assignment.target)
            if alias != name:
                yield from _aliases(root, alias)


def _name_of(target: nodes.Node) -> str:
    from jinja2 import nodes

    if not isinstance(target, nodes.Name):
        raise _Unfollowable
    return target.name


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether an expression is variable `name` (or its item `key`), perhaps sliced, filtered or tested."""
    from jinja2 import nodes

    match node:
        case nodes.Filter() | nodes.Test():
            return _reads(node.node, name, key)
        case nodes.Getitem(arg=nodes.Slice()):
            return _reads(node.node, name, key)
        case nodes.Getitem(arg=nodes.Const(value=value)):
            return key is not None and value == key and _is_variable(node.node, name)
        case nodes.Getattr():
            return key is not None and node.attr == key and _is_variable(node.node, name)
        case _:
            return key is None and _is_variable(node, name)


def _is_variable(node: nodes.Node | None, name: str) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
