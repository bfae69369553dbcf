"""A model's chat template, rendered as transformers renders it: the same sandbox, filters, globals and extensions.

Jinja is imported when a template is compiled, not before: a gateway without a tokenizer never loads it.
The behaviour to equal is that of transformers 5.19, utils/chat_template_utils.py, and of vLLM 0.32,
renderers/hf.py; tests/gateway/test_tokens_engine.py compares with both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from headrace.gateway.conversation import UnknownPrompt

if TYPE_CHECKING:
    import jinja2

# Stands where the last message ends, so that everything the template writes after it can be cut off. transformers'
# own words: a template that writes a message twice leaves the first of them in the prompt.
_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "

# What `apply_chat_template` takes for itself, or vLLM sets: as template arguments they do not reach the template.
RESERVED_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


MOST_KNOWN = 256  # attributes of types


class ChatTemplate:
    """One compiled template. Rendering mutates nothing and takes about 5 µs per message."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the names a template may use: `bos_token`, `eos_token`, ...

        Raises ValueError when the source is not a template.
        """
        import jinja2

        environment = sandbox()
        try:
            self._template: jinja2.Template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"not a chat template: {error}") from error
        # Of all that a template may name what is the same each time: jinja would copy its globals for every prompt.
        self._names = {**environment.globals, **special_tokens}
        self._names_content = "content" in source
        # vLLM asks the same question of the text; see `conversation.as_system`.
        self.knows_developer = '"developer"' in source or "'developer'" in source

    def render(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text. Raises UnknownPrompt where the template refuses; the engine then says why."""
        if continue_final_message:
            if add_generation_prompt or not self._names_content:
                raise UnknownPrompt("the final message cannot be continued")
            conversation = [*conversation[:-1], _with_end_mark(conversation[-1])]
        try:
            names = {
                **self._names,
                **(arguments or {}),
                "messages": conversation,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            }
            context = self._template.new_context(names, shared=True)
            text = "".join(self._template.root_render_func(context))
        except Exception as error:  # a template is the model's code and may raise anything
            raise UnknownPrompt(f"the chat template refuses: {type(error).__name__}: {error}") from error
        return _until_end_mark(text) if continue_final_message else text


def _with_end_mark(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _END_MARK}
    for at in range(len(content or ()) - 1, -1, -1):
        part = content[at]  # type: ignore[index]
        if "text" in part:
            marked = list(content)  # type: ignore[arg-type]
            marked[at] = {**part, "text": part["text"] + _END_MARK}
            return {**message, "content": marked}
    raise UnknownPrompt("the final message has no text to continue")


def _until_end_mark(text: str) -> str:
    """A template that strips its messages takes the mark's trailing space along: strip likewise, as transformers."""
    at = text.rfind(_END_MARK.strip())
    if at < 0:
        raise UnknownPrompt("the chat template drops the final message")
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()


def sandbox() -> jinja2.Environment:
    """The environment that templates are written for."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the model said, for training; here it only passes its body through.

        As a call block, because a block's own scope hides the variables set inside it.
        """

        tags = {"generation"}  # noqa: RUF012 Jinja's own declaration

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's answer depends on the object's type and the name alone: it is kept, 1.5 µs for each `loop.first`."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            asked = type(obj), attr
            safe = known.get(asked)
            if safe is None:
                safe = super().is_safe_attribute(obj, attr, value)
                if len(known) < MOST_KNOWN:  # a template may make names of what messages say
                    known[asked] = safe
            return safe

    known: dict[tuple[type, str], bool] = {}
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; prompts want plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    """Templates that write the date: equal to the engine's as long as both clocks show the same day."""
    return datetime.now().strftime(pattern)
