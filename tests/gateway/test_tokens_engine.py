"""Our prompts against vLLM's and transformers' own functions, without an engine."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.backends import embedded_model
from headrace.gateway import tokens
from headrace.gateway.content_format import detect
from headrace.gateway.conversation import _PART_FIELDS
from headrace.gateway.tokenizer_folder import load, locate

pytestmark = pytest.mark.vllm

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "plain": PLAIN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tools": "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{{ t.function|tojson(indent=2) }}"
    "{% endfor %}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name or '' }}"
    "{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c | tojson }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endif %}{{ m.tool_call_id or '' }}{{ m.reasoning or '' }}"
    "<|im_end|>{% endfor %}",
    "parts": "{{ bos_token }}{%- for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}[{{ part.text }}]{{ part|tojson }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}",
    "macro": "{% macro show(content) %}{% for part in content %}{{ part['text'] }}{% endfor %}{% endmacro %}"
    "{% for message in messages %}{{ show(message.content) }}{% endfor %}",
    "loose": "{% for message in messages %}{% set content = message.content %}{% for c in content %}{{ c.text }}"
    "{% endfor %}{% endfor %}",
    "sliced": "{% set rest = messages[1:] %}{% for m in rest | list %}{{ m.content }}{% endfor %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{{ reasoning_effort }}"
    "{{ documents }}{% generation %}{{ eos_token }}{% endgeneration %}",
    "strict": "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "developer": "{% for m in messages %}{{ 'developer' if m.role == \"developer\" else m.role }}{{ m.content }}"
    "{% endfor %}",
    "unpacked": "{% for a, b in messages %}{{ a }}{% endfor %}",
}
TOOL = {
    "type": "function",
    "function": {
        "parameters": {"type": "object", "b": 1, "a": 1.0},
        "name": "f",
        "description": "Does é < f",
        "x": 1,
    },
}
CALL = {
    "type": "function",
    "index": 0,
    "id": "c1",
    "function": {"name": "f", "arguments": '{"b": 1.0, "a": "é"}'},
}
USER = {"role": "user", "content": "Hello <|im_start|> there\n"}
REQUESTS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    "turns": {
        "messages": [USER, {"role": "assistant", "content": " Hi. "}, {"role": "user", "content": "日本 🙂"}]
    },
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"text": "a", "type": "text", "cache_control": {"type": "ephemeral"}},
                    "b",
                    {"type": "input_text", "text": "c"},
                    {"type": "refusal", "refusal": "d"},
                ],
            }
        ]
    },
    "empty parts": {"messages": [{"role": "user", "content": []}, {"role": "user", "content": ""}]},
    "tools": {
        "messages": [USER],
        "tools": [TOOL, {"type": "function", "function": {"name": "g", "strict": True}}],
    },
    "calls": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": [{"type": "text", "text": "r1"}, {"type": "text", "text": "r2"}],
            },
            {"role": "assistant", "content": "done", "tool_calls": []},
        ],
        "tools": [TOOL],
        "tool_choice": "none",
    },
    "bad arguments": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "not json"}}],
            },
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]},
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}]},
        ]
    },
    "developer": {
        "messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, USER]
    },
    "billing": {
        "messages": [{"role": "system", "content": "x-anthropic-billing-header: cch=1\nBe brief."}, USER]
    },
    "continue": {
        "messages": [USER, {"role": "assistant", "content": "Once upon "}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "no prompt": {"messages": [USER], "add_generation_prompt": False},
    "special": {"messages": [USER], "add_special_tokens": True},
    "arguments": {
        "messages": [USER],
        "chat_template_kwargs": {
            "enable_thinking": True,
            "eos_token": "X",
            "unused": 1,
            "reasoning_effort": None,
        },
    },
    "effort": {"messages": [USER], "reasoning_effort": "low"},
    "no effort": {"messages": [USER], "reasoning_effort": "none"},
    "documents": {"messages": [USER], "documents": [{"title": "t", "text": "x"}]},
    "names": {"messages": [{**USER, "name": "Ann"}, {"role": "custom", "content": "x", "extra": [1]}]},
    "reasoning": {"messages": [USER, {"role": "assistant", "content": "a", "reasoning": "r"}, USER]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model's tokenizer, once with each template."""
    model = embedded_model.ensure(lambda _phase: None)
    folders = {"embedded": model}
    for name, template in TEMPLATES.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            (folder / file).write_bytes((model / file).read_bytes())
        (folder / "chat_template.jinja").write_text(template)
    return folders


@lru_cache
def engines_tokenizer(folder: Path) -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(folder))


our_tokenizer = lru_cache(load)


def engines_ids(folder: Path, body: dict[str, Any]) -> list[int] | None:
    """What vLLM makes of a chat request, by its own functions in its own order. None where it refuses."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import hf
    from vllm.renderers.chat_utils import parse_chat_messages
    from vllm.renderers.params import merge_kwargs

    tokenizer = engines_tokenizer(folder)
    model_config: Any = SimpleNamespace(
        multimodal_config=None,
        is_multimodal_model=False,
        enable_prompt_embeds=False,
        tokenizer_revision=None,
        revision=None,
        code_revision=None,
        trust_remote_code=False,
        tokenizer=str(folder),
        model=str(folder),
        hf_config=SimpleNamespace(model_type="llama"),
        max_model_len=2048,
        allowed_local_media_path="",
        allowed_media_domains=None,
    )
    try:
        request = ChatCompletionRequest(**json.loads(json.dumps({"model": "m", **body})))
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(None, "auto").with_defaults(
            merge_kwargs({}, {"tools": tools, "tokenize": False})
        )
        messages, _, _ = parse_chat_messages(
            request.messages,
            model_config,
            content_format=hf.resolve_chat_template_content_format(
                None, tools, "auto", tokenizer, model_config=model_config
            ),
        )
        text = hf.safe_apply_chat_template(
            model_config, tokenizer, messages, **params.get_apply_chat_template_kwargs()
        )
    except Exception:
        return None
    encode = request.build_tok_params(model_config).get_encode_kwargs()
    ids: list[int] = tokenizer(text, **encode)["input_ids"]
    return ids


def our_ids(folder: Path, path: bytes, body: dict[str, Any]) -> list[int]:
    tokenizer = our_tokenizer(folder)
    rendered = tokens.render(tokenizer, path, json.dumps(body).encode())
    (prompt,) = rendered.prompts
    if not isinstance(prompt, str):
        return prompt.tolist()
    return tokenizer.segments.token_ids(prompt, add_special_tokens=rendered.add_special_tokens).tolist()


def test_chat_prompts_equal_vllms(folders: dict[str, Path]) -> None:
    wrong, refused = [], 0
    for template, request in product(folders, REQUESTS):
        theirs = engines_ids(folders[template], REQUESTS[request])
        if theirs is None:
            refused += 1
            continue
        try:
            ours: list[int] | str = our_ids(folders[template], tokens.CHAT_PATH, REQUESTS[request])
        except tokens.UnknownPrompt as unknown:
            ours = str(unknown)
        if ours != theirs:
            wrong.append((template, request, ours if isinstance(ours, str) else len(ours), len(theirs)))
    assert not wrong
    assert refused < len(folders) * len(REQUESTS) / 5, "too few requests were compared"


def test_completion_prompts_equal_transformers(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folders["embedded"]))
    for text in ("Once", "é 日本 <|im_start|>x", " \n\n", "def f():\n\treturn 1"):
        assert (
            our_ids(folders["embedded"], tokens.COMPLETIONS_PATH, {"prompt": text})
            == tokenizer(text)["input_ids"]
        )


@pytest.mark.parametrize(
    "adds", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {}]
)
def test_framed_texts_equal_transformers(
    folders: dict[str, Path], tmp_path: Path, adds: dict[str, bool]
) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    framed = Tokenizer.from_file(str(folders["embedded"] / "tokenizer.json"))
    framed.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", 2)]
    )
    framed.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((folders["embedded"] / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **adds}))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))("Once")["input_ids"]
    assert our_ids(tmp_path, tokens.COMPLETIONS_PATH, {"prompt": "Once"}) == theirs


def test_content_format_is_vllms(folders: dict[str, Path]) -> None:
    import vllm.transformers_utils.chat_templates as shipped
    from vllm.renderers.hf import _detect_content_format

    sources = dict(TEMPLATES)
    sources |= {file.name: file.read_text() for file in Path(shipped.__file__).parent.glob("*.jinja")}
    for name, source in sources.items():
        assert detect(source) == _detect_content_format(source, default="string"), name


def test_part_fields_are_vllms() -> None:
    from vllm.renderers.chat_utils import _KNOWN_CONTENT_PART_FIELDS

    assert set(_PART_FIELDS) == set(_KNOWN_CONTENT_PART_FIELDS)


def test_embedded_model_is_found() -> None:
    embedded_model.ensure(lambda _phase: None)
    assert locate("embedded", {}) == embedded_model.folder()
