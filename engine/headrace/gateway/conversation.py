"""Chat messages as vLLM hands them to a chat template: parts flattened, tool calls decoded, roles settled.

What stands here must equal vLLM 0.32, renderers/chat_utils.py, and the order in which pydantic leaves the keys of its
typed dictionaries. Anything that it refuses, or that is not text, raises `UnknownPrompt`: the gateway then does not
know the prompt's tokens, and only that; the request goes on untouched.
"""

from __future__ import annotations

import json
from typing import Any

# Fields of vLLM's content part types. Others are the caller's own and stay with a part (`cache_control`).
_PART_FIELDS = frozenset(
    {
        "audio_embeds",
        "audio_url",
        "closed",
        "data",
        "file",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "name",
        "prompt_cache_breakpoint",
        "refusal",
        "text",
        "thinking",
        "type",
        "uuid",
        "video_embeds",
        "video_url",
    }
)
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_TOOL_CALL_ORDER = ("id", "function", "type")
_FUNCTION_ORDER = ("arguments", "name")
# A line that one client puts before its system prompt, different in every request; vLLM drops it.
_BILLING_LINE = "x-anthropic-billing-header"


class UnknownPrompt(Exception):
    """The prompt's tokens cannot be known here. The message says why, for people and metrics; nothing is wrong."""


def conversation(messages: Any, *, as_parts: bool) -> list[dict[str, Any]]:
    """The messages of a request body as a template sees them. `as_parts`: content as a list of parts, not a string."""
    if not isinstance(messages, list) or not messages:
        raise UnknownPrompt("no messages")
    return [_message(message, as_parts) for message in messages]


def _message(message: Any, as_parts: bool) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UnknownPrompt("a message without a role")
    role = message["role"]
    result: dict[str, Any] = {"role": role, "content": _content(message.get("content"), role, as_parts)}
    if role == "assistant":
        if message.get("tool_calls") is not None:
            calls = [_tool_call(call) for call in _list(message["tool_calls"])]
            if calls:  # an empty list takes the template's way for messages without calls
                result["tool_calls"] = calls
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            result["reasoning"] = result["reasoning_content"] = reasoning
    elif role == "tool":
        if "tool_call_id" in message:
            result["tool_call_id"] = message["tool_call_id"]
        if as_parts and all(part["type"] == "text" for part in result["content"]):
            result["content"] = "\n".join(part["text"] for part in result["content"])
    for key in ("name", "task"):
        if isinstance(message.get(key), str):
            result[key] = message[key]
    if role == "developer":
        result["tools"] = message.get("tools")
    return result


def _content(content: Any, role: str, as_parts: bool) -> Any:
    if content is None:
        parts = []
    elif isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    else:
        parts = [part for part in map(_part, _list(content)) if part is not None]
    if role == "system":
        parts = [part for part in map(_without_billing_line, parts) if part is not None]
    if as_parts:
        return parts
    return "\n".join(part["text"] if "text" in part else part["name"] for part in parts)


def _part(part: Any) -> dict[str, Any] | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or part.get("uuid") is not None:
        raise UnknownPrompt("content that is not text")
    kind = part.get("type")
    if kind == "tool_reference" and isinstance(part.get("name"), str):
        return {"type": "tool_reference", "name": part["name"]}
    if kind not in _TEXT_KEYS:
        raise UnknownPrompt("content that is not text")
    text = part.get(_TEXT_KEYS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise UnknownPrompt(f"a {kind} part without text")
    return {
        "type": "text",
        "text": text,
        **{key: value for key, value in part.items() if key not in _PART_FIELDS},
    }


def _without_billing_line(part: dict[str, Any]) -> dict[str, Any] | None:
    if part["type"] != "text" or not part["text"].startswith(_BILLING_LINE):
        return part
    rest = part["text"].partition("\n")[2]
    return {**part, "text": rest} if rest else None


def _tool_call(call: Any) -> dict[str, Any]:
    """Arguments arrive as JSON text; templates want the object. What is no object becomes an empty one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise UnknownPrompt("a tool call that is no function call")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    decoded = {**function, "arguments": arguments if isinstance(arguments, dict) else {}}
    return _ordered({**call, "function": _ordered(decoded, _FUNCTION_ORDER)}, _TOOL_CALL_ORDER)


def tool_definitions(tools: Any) -> list[dict[str, Any]] | None:
    """The request's `tools` as vLLM passes them on: known fields only, in its order, absent ones as null."""
    if tools is None:
        return None
    definitions = []
    for tool in _list(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnknownPrompt("a tool without a name")
        deferred = tool.get("defer_loading")
        inner = {key: function.get(key) for key in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            inner["strict"] = function["strict"]
        inner_deferred = function.get("defer_loading")
        if inner_deferred is None:
            inner_deferred = deferred
        if inner_deferred is not None:
            inner["defer_loading"] = inner_deferred
        definition = {"type": "function", "function": inner}
        if deferred is not None:
            definition["defer_loading"] = deferred
        definitions.append(definition)
    if not definitions:
        raise UnknownPrompt("an empty list of tools")
    return definitions


def as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates that do not know the role `developer`: it becomes `system`; all system messages one, in front."""
    if all(message["role"] != "developer" for message in messages):
        return messages
    renamed = [
        {key: value for key, value in {**message, "role": "system"}.items() if key != "tools"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    at = [index for index, message in enumerate(renamed) if message["role"] == "system"]
    if at == [0]:
        return renamed
    texts = [_plain(renamed[index]["content"]) for index in at]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in renamed if message["role"] != "system")]


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)


def _ordered(mapping: dict[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    ordered = {key: mapping[key] for key in first if key in mapping}
    ordered.update(mapping)
    return ordered


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UnknownPrompt("a field that should be a list")
    return value
