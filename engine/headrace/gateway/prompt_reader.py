"""What the gateway finds out about a prompt before it chooses a replica.

    by length ── short ──────────────────────────────> load alone
        │ ──── no tokenizer, or not worth it ────────> text chunks
        └ render, cut ── all segments known ─────────> tokens, at once
                 ├────── little is missing ──────────> tokens, encoded here
                 ├────── more is missing ────────────> tokens, encoded in a thread: the caller awaits
                 └────── more than it can save ──────> text chunks

Nothing here fails a request: whatever goes wrong, less is known of the prompt.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.gateway import tokens
from headrace.gateway.conversation import UnknownPrompt
from headrace.gateway.prompt_text import chunk_hashes, prompt_text
from headrace.gateway.segment_cache import Plan
from headrace.gateway.token_check import TokenCheck
from headrace.gateway.token_choice import How, TokenChoice, TokenCosts
from headrace.gateway.tokenizer_folder import ModelTokenizer
from headrace_kernels.block_hash import hash_blocks, salt

log = logging.getLogger(__name__)

INLINE_S = 0.0005
"""Encoding that is expected to take less than this is done on the event loop: a thread costs 0.1 ms itself."""
MAX_THREADS = 4


class Prompt(NamedTuple):
    """What is known of a prompt. `choice.how` says which of the fields are there."""

    choice: TokenChoice
    token_ids: NDArray[np.uint32] | None = None  # of the first prompt, where a request has several
    num_tokens: int | None = None  # of all prompts of the request, as the engine will report them
    chunks: NDArray[np.uint64] | None = None  # hashes of text chunks
    cache_salt: str | None = None

    def block_hashes(self, model: str, sizes: tuple[int, ...]) -> dict[int, NDArray[np.uint64]] | None:
        """Hashes of the full blocks for every block size in the fleet; None without tokens."""
        if self.token_ids is None:
            return None
        parent = root(model, self.cache_salt)
        return {size: hash_blocks(self.token_ids, size, parent) for size in sizes}


@lru_cache(maxsize=4096)
def root(model: str, cache_salt: str | None) -> int:
    """The parent of a prompt's first block or chunk."""
    return salt(model, cache_salt=cache_salt)


class ModelPrompts:
    """One model's tokenizer and what was learned of it."""

    def __init__(self, tokenizer: ModelTokenizer | None = None) -> None:
        self.tokenizer = tokenizer  # None: none to be had, or not loaded yet
        self.why_none = ""
        self.costs = TokenCosts()
        self.check = TokenCheck()
        self.read: dict[tuple[How, str], int] = {}  # prompts by how they were known and why
        self.encoding: dict[
            str, asyncio.Future[bytes]
        ] = {}  # segments that a thread is at, for siblings to await

    def settle(
        self, prompt: Prompt, predicted_tokens: int, engine_prompt_tokens: int, engine_cached_tokens: int
    ) -> None:
        """The request ended well and the engine reported its usage: check and learn."""
        how = prompt.choice.how
        if prompt.num_tokens is not None:
            trusted = self.check.trusted
            if not self.check.compare(prompt.num_tokens, engine_prompt_tokens):
                if trusted and not self.check.trusted:
                    log.warning(
                        "our tokens are not the engine's (%d where it counts %d): routing on text instead",
                        *(self.check.last_mismatch or (0, 0)),
                    )
                return
        self.check.found(how, predicted_tokens, engine_cached_tokens)
        self.costs.settled(how, predicted_tokens, engine_cached_tokens, engine_prompt_tokens)


class PromptReader:
    """Of one gateway. One event loop owns it; its threads only encode."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._models: dict[str, ModelPrompts] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._backlog_s = 0.0  # expected seconds of encoding handed to threads and not yet done

    def of(self, model: str) -> ModelPrompts:
        """What is known of a model; made when first asked for, so ask only for models that are served."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = ModelPrompts()
        return known

    def models(self) -> dict[str, ModelPrompts]:
        """Everything, for metrics. Not to be modified."""
        return self._models

    def close(self) -> None:
        """Drop what the threads have not begun."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def read(
        self, model: str, path: bytes, body: bytes, *, block_size: int | None, prefill_tokens_per_s: float
    ) -> Prompt | asyncio.Task[Prompt]:
        """What can be known of this prompt; a task where a thread has to work for it first.

        `block_size` is the smallest among the replicas that tell of their caches, None where none does;
        `prefill_tokens_per_s` that of a typical replica. Cancelling the task is safe. Never raises.
        """
        known = self.of(model)
        tokenizer = known.tokenizer
        if tokenizer is not None and not (path in tokens.PATHS and known.check.trusted):
            tokenizer = None
        choice = known.costs.before(
            len(body),
            block_size=block_size,
            has_tokenizer=tokenizer is not None,
            prefill_tokens_per_s=prefill_tokens_per_s,
        )
        if choice.how is How.LOAD:
            return _counted(known, Prompt(choice))
        if choice.how is How.TEXT or tokenizer is None:
            return self._by_text(known, model, body, choice)
        started_s = perf_counter()
        try:
            rendered = tokens.render(tokenizer, path, body)
        except UnknownPrompt as unknown:
            log.debug("%s: %s", model, unknown)
            return self._by_text(known, model, body, TokenChoice(How.TEXT, "unknown prompt"))
        plans = [
            tokenizer.segments.plan(prompt) if isinstance(prompt, str) else prompt
            for prompt in rendered.prompts
        ]
        known.costs.rendered(len(body), perf_counter() - started_s)
        missing_chars = sum(plan.missing_chars for plan in plans if isinstance(plan, Plan))
        choice = known.costs.after(
            missing_chars, self._backlog_s / self._num_threads, len(body), prefill_tokens_per_s
        )
        if choice.how is How.TEXT:
            return self._by_text(known, model, body, choice)
        work = _Work(known, tokenizer, rendered, plans, choice, len(body))
        if known.costs.encode_s(missing_chars) <= INLINE_S:
            started_s = perf_counter()
            encoded = tokenizer.segments.encode(work.missing())
            if missing_chars:
                known.costs.encoded(missing_chars, perf_counter() - started_s)
            return work.finish(encoded)
        return self._loop.create_task(self._in_thread(work, model, body))

    def _by_text(self, known: ModelPrompts, model: str, body: bytes, choice: TokenChoice) -> Prompt:
        text, cache_salt = prompt_text(body)
        if not text:
            return _counted(known, Prompt(TokenChoice(How.LOAD, "no prompt text")))
        chunks = chunk_hashes(text, root(model, cache_salt))
        return _counted(known, Prompt(choice, chunks=chunks, cache_salt=cache_salt))

    async def _in_thread(self, work: _Work, model: str, body: bytes) -> Prompt:
        """A burst of siblings encodes what they share once: who comes second awaits the first one's segments."""
        missing = work.missing()
        under_way = work.known.encoding
        mine = [segment for segment in dict.fromkeys(missing) if segment not in under_way]
        if mine:
            self._encode(work, mine)
        awaited = [under_way[segment] for segment in missing]
        try:
            await asyncio.wait(set(awaited))
            return work.finish([future.result() for future in awaited])
        except Exception:  # supervision boundary: a tokenizer that fails costs precision, not the request
            log.exception("tokenising failed, routing on text")
            return self._by_text(work.known, model, body, TokenChoice(How.TEXT, "tokenizer failed"))

    def _encode(self, work: _Work, segments: list[str]) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="tokenizer")
        known, tokenizer = work.known, work.tokenizer
        num_chars = sum(map(len, segments))
        expected_s = known.costs.encode_s(num_chars)
        self._backlog_s += expected_s
        for segment in segments:
            known.encoding[segment] = self._loop.create_future()

        def encode() -> tuple[list[bytes], float]:
            started_s = perf_counter()
            return tokenizer.segments.encode(segments), perf_counter() - started_s

        def done(job: asyncio.Future[tuple[list[bytes], float]]) -> None:
            self._backlog_s = max(self._backlog_s - expected_s, 0.0)
            error = None if job.cancelled() else job.exception()
            for at, segment in enumerate(segments):
                future = known.encoding.pop(segment)
                if job.cancelled():
                    future.cancel()
                elif error is not None:
                    future.set_exception(error)
                    future.exception()  # whoever still awaits it hears of it; nobody has to
                else:
                    future.set_result(job.result()[0][at])
            if error is None and not job.cancelled():
                known.costs.encoded(num_chars, job.result()[1])

        self._loop.run_in_executor(self._threads, encode).add_done_callback(done)


class _Work(NamedTuple):
    """One request on its way from text to tokens."""

    known: ModelPrompts
    tokenizer: ModelTokenizer
    rendered: tokens.Rendered
    plans: list[Plan | tokens.Ids]  # of each prompt; ids where the request brought them
    choice: TokenChoice
    body_bytes: int

    def missing(self) -> list[str]:
        return [segment for plan in self.plans if isinstance(plan, Plan) for segment in plan.missing]

    def finish(self, encoded: list[bytes]) -> Prompt:
        """`encoded` holds the missing segments' ids, in order."""
        known, rendered = self.known, self.rendered
        first: tokens.Ids | None = None
        num_tokens = at = 0
        for plan in self.plans:
            ids = plan
            if isinstance(plan, Plan):
                part = encoded[at : at + len(plan.missing)]
                at += len(plan.missing)
                ids = self.tokenizer.segments.finish(
                    plan, part, add_special_tokens=rendered.add_special_tokens
                )
            first = ids if first is None else first  # type: ignore[assignment]
            num_tokens += len(ids)
        known.costs.counted(self.body_bytes, num_tokens)
        prompt = Prompt(self.choice, first, num_tokens, cache_salt=rendered.cache_salt)
        return _counted(known, prompt)


def _counted(known: ModelPrompts, prompt: Prompt) -> Prompt:
    key = (prompt.choice.how, prompt.choice.reason)
    known.read[key] = known.read.get(key, 0) + 1
    return prompt
