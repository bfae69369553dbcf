"""A request body → the texts and token ids that the engine will see. Pure but for the clock that templates may read.

    body ─ render ─> Rendered: one text (chat) or several texts and id lists (completions) ─ SegmentTokenizer ─> ids

Defaults and field meanings are vLLM 0.32's (entrypoints/openai/*/protocol.py). Whatever is not followed here raises
`UnknownPrompt`; the engine alone judges whether a request is right.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.gateway.chat_template import RESERVED_ARGUMENTS
from headrace.gateway.conversation import UnknownPrompt, as_system, conversation, tool_definitions
from headrace.gateway.tokenizer_folder import ModelTokenizer

CHAT_PATH = b"/v1/chat/completions"
COMPLETIONS_PATH = b"/v1/completions"
PATHS = frozenset({CHAT_PATH, COMPLETIONS_PATH})
"""Paths whose prompts can be tokenised here."""

Ids = NDArray[np.uint32]


class Rendered(NamedTuple):
    """The prompts of one request, each a text or its token ids."""

    prompts: list[str | Ids]
    add_special_tokens: bool
    cache_salt: str | None


class _Chat(msgspec.Struct, gc=False):
    messages: Any = None
    tools: Any = None
    tool_choice: Any = None
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    reasoning_effort: str | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncate_prompt_tokens: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None


class _Completion(msgspec.Struct, gc=False):
    prompt: Any = None  # text, token ids, or a list of either
    suffix: Any = None
    prompt_embeds: Any = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: Any = None
    cache_salt: str | None = None


_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_completion = msgspec.json.Decoder(_Completion).decode


def render(tokenizer: ModelTokenizer, path: bytes, body: bytes) -> Rendered:
    """What the engine will tokenise. About 60 µs for 32 KB of chat. Raises UnknownPrompt."""
    try:
        if path == CHAT_PATH:
            return _render_chat(tokenizer, _decode_chat(body))
        if path == COMPLETIONS_PATH:
            return _render_completion(_decode_completion(body))
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UnknownPrompt(f"a field of an unexpected kind: {error}") from error
    raise UnknownPrompt("not a path whose prompts are known")


def _render_chat(tokenizer: ModelTokenizer, chat: _Chat) -> Rendered:
    if chat.truncate_prompt_tokens is not None or chat.chat_template is not None:
        raise UnknownPrompt("the request changes how its prompt is made")
    if chat.kv_transfer_params and "prompt_token_ids" in chat.kv_transfer_params:
        raise UnknownPrompt("the request brings its prompt's tokens along")
    tools = tool_definitions(chat.tools)
    if chat.tool_choice == "none" and tokenizer.drops_tools_for_none:
        tools = None
    template = tokenizer.chat if tools is None else tokenizer.chat_with_tools
    if template is None:
        raise UnknownPrompt("the model has no chat template")
    messages = conversation(chat.messages, as_parts=template.format == "openai")
    if not template.compiled.knows_developer:
        messages = as_system(messages)
    text = template.compiled.render(
        messages,
        tools=tools,
        documents=chat.documents,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        arguments=_arguments(tokenizer, chat),
    )
    return Rendered([text], chat.add_special_tokens, chat.cache_salt)


def _arguments(tokenizer: ModelTokenizer, chat: _Chat) -> dict[str, Any] | None:
    """Template arguments: the engine's defaults under the request's own, and what `reasoning_effort` implies."""
    own = chat.chat_template_kwargs or {}
    if chat.reasoning_effort is None and not own and not tokenizer.default_arguments:
        return None
    if not RESERVED_ARGUMENTS.isdisjoint(own) or not RESERVED_ARGUMENTS.isdisjoint(
        tokenizer.default_arguments
    ):
        raise UnknownPrompt("template arguments that are fields of their own")
    arguments = dict(own)
    if chat.reasoning_effort is not None:
        arguments["reasoning_effort"] = chat.reasoning_effort
        arguments.setdefault("enable_thinking", chat.reasoning_effort != "none")
    # An argument of the request that is null or "auto" leaves the engine's default in place.
    given = {
        key: value
        for key, value in arguments.items()
        if value is not None and not (isinstance(value, str) and value == "auto")
    }
    return {**tokenizer.default_arguments, **given}


def _render_completion(completion: _Completion) -> Rendered:
    if (
        completion.truncate_prompt_tokens is not None
        or completion.suffix is not None
        or completion.prompt_embeds is not None
    ):
        raise UnknownPrompt("the request changes how its prompt is made")
    prompt = completion.prompt
    if isinstance(prompt, str):
        prompts: list[str | Ids] = [prompt]
    elif not isinstance(prompt, list) or not prompt:
        raise UnknownPrompt("no prompt")
    elif isinstance(prompt[0], int):
        prompts = [_ids(prompt)]
    else:
        prompts = [each if isinstance(each, str) else _ids(each) for each in prompt]
    return Rendered(prompts, completion.add_special_tokens, completion.cache_salt)


def _ids(prompt: Any) -> Ids:
    """A list of int as an array; array() converts in a third of numpy's time."""
    try:
        return np.frombuffer(array("I", prompt), np.uint32) if prompt else np.empty(0, np.uint32)
    except (TypeError, OverflowError) as error:
        raise UnknownPrompt(f"token ids that are none: {error}") from error
