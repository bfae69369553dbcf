"""What this gateway knows of prompts and of the caches that hold them; made only for policies that want to know.

    request ── PromptReader ──> tokens or text chunks ──┐
    replicas' KV events ── KvFeed ──> PrefixIndex ──────┴─> Router.choose
    own routing ────────────────────> TextIndex ────────┘

Importing this brings numba; making one compiles its kernels or loads them from the cache (0.3 s), so that no request
ever pays for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.gateway import tokenizer_folder
from headrace.gateway.kv_feed import KvFeed
from headrace.gateway.openai import Usage
from headrace.gateway.prompt_reader import Prompt, PromptReader
from headrace_kernels.compilation import warm
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Router
from headrace_router.text_index import TextIndex
from headrace_router.types import BootId, Membership, ReplicaId
from headrace_router.view import Decision

log = logging.getLogger(__name__)

DEFAULT_PREFILL_TOKENS_PER_S = 10_000.0


class TokenizerSource(NamedTuple):
    """Where a model's tokenizer files are: as in the configuration, `source` and the pool's engine arguments."""

    source: str
    engine: Mapping[str, Any]


class Prefixes:
    """Of one gateway. One event loop owns it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tokenizers: Mapping[str, TokenizerSource]) -> None:
        """`tokenizers` by served name; "*" stands for every model that has no entry."""
        warm()
        self.index = PrefixIndex()
        self.texts = TextIndex()
        self.prompts = PromptReader(loop)
        self.feed = KvFeed(loop, self.index)
        self._tokenizers = tokenizers
        self._boots: dict[ReplicaId, BootId] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._loop = loop

    def follow(self, membership: Membership) -> None:
        """The router has taken this membership: listen to its replicas, load tokenizers of new models."""
        self.feed.follow(membership)
        for replica in membership.replicas:
            model = replica.model
            if self._boots.get(replica.id) != replica.boot_id:
                # Another start, perhaps of another version or tokenizer: what disagreed may agree now.
                self._boots[replica.id] = replica.boot_id
                self.prompts.of(model).check.reset()
            source = self._tokenizers.get(model) or self._tokenizers.get("*")
            if model not in self._loading and source is not None:
                self._loading[model] = self._loop.create_task(self._load(model, source))

    def take_tokenizers(self, tokenizers: Mapping[str, TokenizerSource]) -> None:
        """Where the tokenizers are now; those that are elsewhere than before are loaded anew."""
        before, self._tokenizers = self._tokenizers, tokenizers
        for model in list(self._loading):
            source = tokenizers.get(model) or tokenizers.get("*")
            if source != (before.get(model) or before.get("*")):
                self._loading.pop(model).cancel()
                if source is not None:
                    self._loading[model] = self._loop.create_task(self._load(model, source))

    async def _load(self, model: str, source: TokenizerSource) -> None:
        """Until this is done, and when it fails, the model's prompts are known by their text."""
        known = self.prompts.of(model)
        try:
            folder = await asyncio.to_thread(tokenizer_folder.locate, source.source, source.engine)
            known.tokenizer = await asyncio.to_thread(tokenizer_folder.load, folder, source.engine)
        except tokenizer_folder.NoTokenizer as reason:
            known.why_none = str(reason)
            log.warning("model %s is routed on text, not tokens: %s", model, reason)

    async def loaded(self) -> None:
        """Wait for the tokenizers that are being loaded."""
        await asyncio.gather(*self._loading.values())

    def read(self, router: Router, model: str, path: bytes, body: bytes) -> Prompt | asyncio.Task[Prompt]:
        """What can be known of a prompt, now or after some work in a thread. Never raises."""
        sizes = self.index.block_sizes(model)
        sample = router.first_eligible(model)
        rate = DEFAULT_PREFILL_TOKENS_PER_S if sample is None else 1 / max(sample.token_s, 1e-9)
        return self.prompts.read(
            model, path, body, block_size=sizes[0] if sizes else None, prefill_tokens_per_s=rate
        )

    def settle(self, decision: Decision, prompt: Prompt, usage: Usage) -> None:
        """A request ended and its engine said what it found: check and learn."""
        model = decision.load.replica.model
        self.prompts.of(model).settle(prompt, decision.hit_tokens, usage.prompt_tokens, usage.cached_tokens)

    def tick(self) -> None:
        """Called a few times a second."""
        self.feed.tick()

    def stop(self) -> None:
        """Close everything. Safe twice."""
        for task in self._loading.values():
            task.cancel()
        self.feed.stop()
        self.prompts.close()
