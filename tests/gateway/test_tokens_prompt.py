"""From a request body to what routing knows of its prompt: how it is chosen, read and checked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from headrace.gateway import tokens
from headrace.gateway.chat_template import ChatTemplate
from headrace.gateway.conversation import UnknownPrompt
from headrace.gateway.prompt_reader import ModelPrompts, Prompt, PromptReader
from headrace.gateway.prompt_text import prompt_text
from headrace.gateway.token_check import MAX_MISMATCHES, TokenCheck
from headrace.gateway.token_choice import How, TokenCosts
from headrace.gateway.tokenizer_folder import ModelTokenizer, NoTokenizer, load, locate

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT, COMPLETIONS = tokens.CHAT_PATH, tokens.COMPLETIONS_PATH
RATE = 16_000.0  # tokens/s


def definition() -> str:
    """A tokenizer.json whose tokens are bytes and a few pairs of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("e", "r"), ("i", "n"), ("Ġ", "t")]
    vocabulary = {token: at for at, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|start|>", "<|end|>")])
    text: str = tokenizer.to_str()
    return text


def write_folder(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(definition())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **config}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return load(write_folder(tmp_path_factory.mktemp("tokenizer")))


def chat(*texts: str, **more: Any) -> bytes:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def reader_of(tokenizer: ModelTokenizer | None) -> PromptReader:
    reader = PromptReader(asyncio.get_running_loop())
    reader.of("m").tokenizer = tokenizer
    return reader


async def read(reader: PromptReader, path: bytes, body: bytes, block_size: int | None = 4) -> Prompt:
    found = reader.read("m", path, body, block_size=block_size, prefill_tokens_per_s=RATE)
    return found if isinstance(found, Prompt) else await found


# --- rendering


def rendered(tokenizer: ModelTokenizer, body: bytes, path: bytes = CHAT) -> str:
    (text,) = tokens.render(tokenizer, path, body).prompts
    assert isinstance(text, str)
    return text


def test_chat_is_rendered_by_the_models_template(tokenizer: ModelTokenizer) -> None:
    assert rendered(tokenizer, chat("Hello")) == "<|start|>user\nHello<|end|><|start|>assistant\n"


def test_final_message_goes_on(tokenizer: ModelTokenizer) -> None:
    body = chat("Hello", "Once upon ", add_generation_prompt=False, continue_final_message=True)
    assert rendered(tokenizer, body).endswith("<|start|>assistant\nOnce upon ")


@pytest.mark.parametrize(
    "body",
    [
        chat(),
        chat("x", truncate_prompt_tokens=5),
        chat("x", chat_template="{{ messages }}"),
        chat("x", chat_template_kwargs={"messages": []}),
        chat("x", kv_transfer_params={"prompt_token_ids": [1]}),
        chat("x", add_generation_prompt="yes"),
        chat("x", tools=[]),
        chat("x", tools=[{"type": "function"}]),
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
        ).encode(),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}).encode(),
        json.dumps({"messages": "x"}).encode(),
        b"[]",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_what_cannot_be_known_is_said_to_be_unknown(tokenizer: ModelTokenizer, body: bytes) -> None:
    with pytest.raises(UnknownPrompt):
        tokens.render(tokenizer, CHAT, body)


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "messages",
                        "role",
                        "content",
                        "type",
                        "text",
                        "tools",
                        "function",
                        "tool_calls",
                        "prompt",
                        "documents",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_no_body_makes_more_than_an_unknown_prompt(tokenizer: ModelTokenizer, body: Any) -> None:
    for path in (CHAT, COMPLETIONS):
        with contextlib.suppress(UnknownPrompt):
            tokens.render(tokenizer, path, json.dumps(body).encode())


def test_completions_take_text_ids_and_lists_of_either(tokenizer: ModelTokenizer) -> None:
    def prompts(prompt: Any) -> list[Any]:
        found = tokens.render(tokenizer, COMPLETIONS, json.dumps({"prompt": prompt}).encode())
        assert found.add_special_tokens
        return [each if isinstance(each, str) else each.tolist() for each in found.prompts]

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1, 2], [3]]) == [[1, 2], [3]]
    for bad in ([], None, [1, "a"], [-1], [2**40], {"a": 1}):
        with pytest.raises(UnknownPrompt):
            prompts(bad)


# --- folders


def test_folder_without_a_tokenizer_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NoTokenizer, match=r"tokenizer\.json"):
        locate(str(tmp_path), {})
    with pytest.raises(NoTokenizer, match="on this machine"):
        locate("org/model", {}, home=tmp_path)


def test_hugging_face_cache_is_looked_through(tmp_path: Path) -> None:
    hub = tmp_path / ".cache/huggingface/hub/models--org--model"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    write_folder(snapshot)
    assert locate("org/model", {}, home=tmp_path) == snapshot


@pytest.mark.parametrize("engine", [{"tokenizer_mode": "mistral"}, {"skip_tokenizer_init": True}])
def test_engine_arguments_that_change_prompts_are_heeded(tmp_path: Path, engine: dict[str, Any]) -> None:
    with pytest.raises(NoTokenizer):
        load(write_folder(tmp_path), engine)


def test_models_with_a_renderer_of_their_own_are_left_alone(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(NoTokenizer, match="of its own"):
        load(tmp_path)


def test_tokens_missing_from_the_definition_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(NoTokenizer, match="lacks the added token"):
        load(write_folder(tmp_path, added_tokens_decoder={"9": {"content": "<|new|>"}}))


def test_template_of_the_engines_arguments_wins(tmp_path: Path) -> None:
    engine = {
        "chat_template": "{{ messages[0].content }}{{ mood }}",
        "default_chat_template_kwargs": {"mood": "!"},
    }
    assert rendered(load(write_folder(tmp_path), engine), chat("Hello")) == "Hello!"


def test_gateway_loads_no_tokenizer_library_before_it_has_a_tokenizer() -> None:
    code = (
        "import sys, headrace.gateway.prompt_reader, headrace.gateway.kv_feed;"
        "print([name for name in ('tokenizers', 'jinja2', 'transformers', 'torch', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- reading


async def test_prompt_that_fills_no_block_is_routed_on_load_alone(tokenizer: ModelTokenizer) -> None:
    prompt = await read(reader_of(tokenizer), CHAT, chat("Hi"), block_size=64)
    assert prompt.choice.how is How.LOAD and prompt.choice.reason == "short"


async def test_tokens_are_those_of_the_rendered_text(tokenizer: ModelTokenizer) -> None:
    reader = reader_of(tokenizer)
    for _ in range(2):  # the second time from the cache
        prompt = await read(reader, CHAT, chat("Hello there, turbines"))
        assert prompt.choice.how is How.TOKENS
        text = "<|start|>user\nHello there, turbines<|end|><|start|>assistant\n"
        assert prompt.token_ids is not None
        assert prompt.token_ids.tolist() == tokenizer.segments.token_ids(text).tolist()
        assert prompt.num_tokens == len(prompt.token_ids)
    assert prompt.choice.reason == "cached"


async def test_long_text_is_encoded_in_a_thread_and_shared_by_siblings(tokenizer: ModelTokenizer) -> None:
    reader = reader_of(tokenizer)
    body = chat("Where does the water go? " * 4000)
    first, second = (reader.read("m", CHAT, body, block_size=4, prefill_tokens_per_s=100.0) for _ in range(2))
    assert isinstance(first, asyncio.Task) and isinstance(second, asyncio.Task)
    await asyncio.sleep(0)
    assert len(reader.of("m").encoding) == 1
    a, b = await asyncio.gather(first, second)
    assert a.token_ids is not None and b.token_ids is not None
    assert a.token_ids.tolist() == b.token_ids.tolist()
    assert not reader.of("m").encoding
    again = reader.read("m", CHAT, body, block_size=4, prefill_tokens_per_s=100.0)
    assert isinstance(again, Prompt)
    reader.close()


async def test_reading_may_be_cancelled(tokenizer: ModelTokenizer) -> None:
    reader = reader_of(tokenizer)
    body = chat("Whence does the water come? " * 4000)
    first, second = (reader.read("m", CHAT, body, block_size=4, prefill_tokens_per_s=100.0) for _ in range(2))
    assert isinstance(first, asyncio.Task) and isinstance(second, asyncio.Task)
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).choice.how is How.TOKENS
    reader.close()


async def test_tokens_that_cost_more_than_they_save_are_not_taken(tokenizer: ModelTokenizer) -> None:
    reader = reader_of(tokenizer)
    reader.of("m").costs.encode_s_per_char = 1.0
    prompt = await read(reader, CHAT, chat("The tailrace takes the water away again"))
    assert prompt.choice.how is How.TEXT and prompt.choice.reason == "costs more"
    assert prompt.choice.cost_s > prompt.choice.saving_s


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (b"/v1/responses", json.dumps({"input": "x" * 600}).encode(), "no tokenizer"),
        (CHAT, chat("x" * 600, truncate_prompt_tokens=1), "unknown prompt"),
    ],
)
async def test_prompts_that_are_not_known_are_hashed_as_text(
    tokenizer: ModelTokenizer, path: bytes, body: bytes, reason: str
) -> None:
    prompt = await read(reader_of(tokenizer), path, body)
    assert prompt.choice.how is How.TEXT and prompt.choice.reason == reason
    assert prompt.chunks is not None and len(prompt.chunks) >= 2


async def test_body_without_a_prompt_is_routed_on_load(tokenizer: ModelTokenizer) -> None:
    prompt = await read(reader_of(tokenizer), b"/v1/embeddings", json.dumps({"x": "y" * 600}).encode())
    assert prompt.choice.how is How.LOAD


async def test_growing_conversation_shares_its_text_chunks() -> None:
    reader = reader_of(None)
    short = await read(reader, CHAT, chat("a" * 600, "b" * 600))
    longer = await read(reader, CHAT, chat("a" * 600, "b" * 600, "c" * 600))
    assert short.chunks is not None and longer.chunks is not None
    assert longer.chunks[: len(short.chunks)].tolist() == short.chunks.tolist()


def test_cache_salt_and_tools_tell_texts_apart() -> None:
    assert prompt_text(b'{"cache_salt": "s", "tools": [1], "messages": [2]}') == (b"[1][2]", "s")
    assert prompt_text(b"[1]") == (b"", None)


async def test_salted_prompts_share_no_blocks(tokenizer: ModelTokenizer) -> None:
    reader = reader_of(tokenizer)
    plain = (await read(reader, CHAT, chat("Hello there, turbines"))).block_hashes("m", (4,))
    salted = (await read(reader, CHAT, chat("Hello there, turbines", cache_salt="s"))).block_hashes("m", (4,))
    assert plain is not None and salted is not None
    assert not set(plain[4].tolist()) & set(salted[4].tolist())


async def test_several_prompts_are_counted_together(tokenizer: ModelTokenizer) -> None:
    body = json.dumps({"prompt": ["The turbines turn", "and turn"]}).encode()
    prompt = await read(reader_of(tokenizer), COMPLETIONS, body)
    assert prompt.token_ids is not None and prompt.num_tokens is not None
    assert prompt.num_tokens > len(prompt.token_ids)


# --- checking and learning


async def test_model_whose_lengths_differ_falls_back_to_text(tokenizer: ModelTokenizer) -> None:
    reader = reader_of(tokenizer)
    known = reader.of("m")
    for _ in range(MAX_MISMATCHES):
        prompt = await read(reader, CHAT, chat("Hello there, turbines"))
        assert prompt.choice.how is How.TOKENS and prompt.num_tokens is not None
        known.settle(prompt, 0, prompt.num_tokens + 1, 0)
    assert (await read(reader, CHAT, chat("Hello there, turbines"))).choice.how is How.TEXT
    known.check.reset()
    assert (await read(reader, CHAT, chat("Hello there, turbines"))).choice.how is How.TOKENS


def test_few_mismatches_among_many_condemn_nobody() -> None:
    check = TokenCheck()
    for number in range(1000):
        check.compare(7, 8 if number % 50 == 0 else 7)
        assert check.trusted
    assert check.mismatched == 20


def test_predicted_hits_are_counted_beside_the_reported() -> None:
    known = ModelPrompts()
    costs = TokenCosts()
    prompt = Prompt(costs.before(10_000, block_size=None, has_tokenizer=False, prefill_tokens_per_s=RATE))
    for _ in range(50):
        known.settle(prompt, 64, 100, 64)
    assert known.check.predicted_tokens[How.TEXT] == known.check.cached_tokens[How.TEXT] == 50 * 64
    assert known.costs.text_error < 0.01


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-9, 1e3)), max_size=50))
def test_learned_rates_are_never_zero_or_infinite(measured: list[tuple[int, float]]) -> None:
    costs = TokenCosts()
    for size, elapsed_s in measured:
        costs.encoded(size, elapsed_s)
        costs.rendered(size, elapsed_s)
        costs.counted(size, max(1, size // 3))
    assert 0 < costs.encode_s_per_char < 1e6
    assert 0 < costs.render_s_per_byte < 1e6
    assert costs.bytes_per_token > 0


def test_rate_is_learned_within_a_few_requests_despite_an_outlier() -> None:
    costs = TokenCosts()
    for number in range(60):
        costs.encoded(1000, 1.0 if number == 40 else 0.001)
    assert costs.encode_s_per_char == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(
    "forbidden", ["messages.append(1)", "messages[0].update(a=1)", "''.__class__.__mro__"]
)
def test_a_template_is_refused_what_is_unsafe_however_often_it_asks(forbidden: str) -> None:
    template = ChatTemplate("{{ " + forbidden + " }}", {})
    for _ in range(2):
        with pytest.raises(UnknownPrompt, match="unsafe"):
            template.render([{"role": "user", "content": "x"}])
