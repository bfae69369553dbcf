"""A model's tokenizer files: where they lie, what is read from them, and for which models they do not tell enough.

    tokenizer.json            the tokenizer itself
    tokenizer_config.json     names of special tokens; older models' chat template
    chat_template.jinja, chat_templates/*.jinja
    config.json               model type

vLLM loads the same files through transformers. Where it does something else with them (a renderer of its own, a
vision processor), `load` raises: a model without tokens is routed on text, with wrong tokens on nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headrace.backends import embedded_model
from headrace.gateway.chat_template import ChatTemplate
from headrace.gateway.content_format import ContentFormat, detect
from headrace.gateway.segment_cache import SegmentTokenizer

# These are rendered by vLLM's own Python, not by their template.
_OWN_RENDERERS = ("cohere", "deepseek_v32", "deepseek_v4", "gpt_oss", "inkling", "kimi_k3", "kimi_audio")
# Engine arguments that change what a prompt becomes in ways not followed here.
_UNFOLLOWED_ARGUMENTS = ("skip_tokenizer_init", "enable_prompt_embeds", "trust_request_chat_template")
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class NoTokenizer(Exception):
    """This model's prompts cannot be tokenised here. The message says why; the gateway routes on text instead."""


class Template(NamedTuple):
    """A chat template and how it wants a message's content."""

    compiled: ChatTemplate
    format: ContentFormat


class ModelTokenizer(NamedTuple):
    """Everything that turns a model's requests into token ids."""

    segments: SegmentTokenizer
    chat: Template | None  # None: the model has no template and cannot chat
    chat_with_tools: Template | None
    default_arguments: Mapping[str, Any]  # of the template, from the engine's arguments
    drops_tools_for_none: bool  # whether `tool_choice: none` takes the tools out of the prompt


def locate(source: str, engine: Mapping[str, Any], home: Path | None = None) -> Path:
    """The folder with a model's tokenizer: the embedded model's, a folder as given, or Hugging Face's cache.

    `engine` are the vLLM arguments of the model's pool. Raises NoTokenizer when there is none on this machine.
    """
    source = str(engine.get("tokenizer") or source)
    if source == embedded_model.SOURCE:
        folder = embedded_model.folder()
    elif Path(source).is_dir():
        folder = Path(source)
    else:
        hub = (
            (home or Path.home()) / ".cache" / "huggingface" / "hub" / f"models--{source.replace('/', '--')}"
        )
        reference = hub / "refs" / str(engine.get("tokenizer_revision") or engine.get("revision") or "main")
        try:
            folder = hub / "snapshots" / reference.read_text().strip()
        except OSError:
            raise NoTokenizer(f"no tokenizer of {source!r} on this machine") from None
    if not (folder / "tokenizer.json").is_file():
        raise NoTokenizer(f"no tokenizer.json in {folder}")
    return folder


def load(folder: Path, engine: Mapping[str, Any] | None = None) -> ModelTokenizer:
    """Read and compile; blocks for up to a second. Raises NoTokenizer."""
    engine = engine or {}
    if engine.get("tokenizer_mode", "auto") not in ("auto", "hf"):
        raise NoTokenizer(f"tokenizer_mode {engine['tokenizer_mode']!r}")
    for name in _UNFOLLOWED_ARGUMENTS:
        if engine.get(name):
            raise NoTokenizer(f"engine argument {name!r}")
    try:
        config = _read_json(folder / "tokenizer_config.json")
        model_type = str(_read_json(folder / "config.json").get("model_type", ""))
        if model_type.startswith(_OWN_RENDERERS) or (folder / "tekken.json").exists():
            raise NoTokenizer(f"vLLM renders {model_type or 'this model'} in a way of its own")
        if (folder / "chat_template.json").exists():
            raise NoTokenizer("its chat template belongs to a processor")
        segments = _segments(folder, config)
        chat, chat_with_tools = _templates(folder, config, engine)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoTokenizer(str(error)) from error
    return ModelTokenizer(
        segments,
        chat,
        chat_with_tools,
        engine.get("default_chat_template_kwargs") or {},
        bool(engine.get("exclude_tools_when_tool_choice_none")),
    )


def _segments(folder: Path, config: Mapping[str, Any]) -> SegmentTokenizer:
    """As transformers 5 loads it: where there is a tokenizer.json, `add_bos_token` and its kind are not heeded."""
    text = (folder / "tokenizer.json").read_text()
    known = {token["content"] for token in json.loads(text).get("added_tokens") or ()}
    for token in (config.get("added_tokens_decoder") or {}).values():
        if token["content"] not in known:
            raise ValueError(f"tokenizer.json lacks the added token {token['content']!r}")
    return SegmentTokenizer(text)


def _templates(
    folder: Path, config: Mapping[str, Any], engine: Mapping[str, Any]
) -> tuple[Template | None, Template | None]:
    """For requests without and with tools: transformers takes the template named `tool_use` for the latter."""
    given = engine.get("chat_template")
    if given:
        sources = {"default": Path(given).read_text() if Path(given).is_file() else str(given)}
    else:
        sources = _sources(folder, config)
    if not sources:
        return None, None
    if "default" not in sources:
        raise ValueError("several chat templates, none of them the default")
    forced = engine.get("chat_template_content_format", "auto")
    names = _special_tokens(folder, config)

    def compiled(source: str) -> Template:
        return Template(
            ChatTemplate(source, names), detect(source) if forced == "auto" else ContentFormat(forced)
        )

    default = compiled(sources["default"])
    return default, compiled(sources["tool_use"]) if "tool_use" in sources else default


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own come before what the configuration holds, as in transformers."""
    sources = {}
    single = folder / "chat_template.jinja"
    if single.is_file():
        sources["default"] = single.read_text()
    for file in sorted((folder / "chat_templates").glob("*.jinja")):
        sources[file.stem] = file.read_text()
    if sources:
        return sources
    held = config.get("chat_template")
    if isinstance(held, str):
        return {"default": held}
    return {entry["name"]: entry["template"] for entry in held or ()}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What a template may use as `bos_token` and so on: a string, or an added token's `content`."""
    named: dict[str, str] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for name in _NAMED_TOKENS:
            token = source.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                named[name] = token
    return named


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no such file. Raises OSError, ValueError."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
