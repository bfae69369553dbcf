"""Looking at one server that somebody else runs: is it up, what does it serve, what does it tell of its cache.

Any OpenAI-compatible server will do. A vLLM server tells more: `/kv_event_sources` where its KV events come from,
`/metrics` how its cache is cut and when its process began, so that a restart is noticed even between two looks.
Standard library only, blocking; called in threads.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from headrace.errors import ConfigError

PROBE_TIMEOUT_S = 2.0


class Card(msgspec.Struct):
    """One entry of /v1/models."""

    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[Card]


class _EventSource(msgspec.Struct):
    endpoint: str | None = None
    replay_endpoint: str | None = None
    enable_kv_cache_events: bool = True
    publisher: str | None = "zmq"


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at a server found."""

    cards: tuple[Card, ...]
    boot: str = ""  # changes when the server restarts, where it tells
    block_size: int | None = None
    num_blocks: int | None = None
    kv_events: str | None = None
    kv_replay: str | None = None


class NotAModelServer(Exception):
    """Something answers at the URL, and it does not say what it serves."""


def check_url(url: str) -> None:
    """Raises ConfigError on what cannot be a backend."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        is_good = False
    if not is_good or parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(f"not a backend URL: {url!r}; give http://HOST:PORT and nothing behind it")


class ServerProbe:
    """Looks at one server, again and again."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """`model`: only this one; also the name of what is served where there is no /v1/models."""
        self.url = url
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._model = model

    def look(self, known: Found | None) -> Found:
        """Blocking. `known` is the last look, None when the server was down; a cheap look serves while it holds.

        Raises OSError or ValueError when nothing answers properly, NotAModelServer when something else does.
        """
        metrics = self._get("/metrics")
        boot = _number(metrics, b"process_start_time_seconds")
        if known is not None and known.boot == boot:
            if metrics is None:
                self._get("/health")  # raises when it is down
            return known
        block_size, num_blocks = _cache_shape(metrics)
        events = self._event_source() if block_size is not None else None
        return Found(
            self._cards(),
            boot,
            block_size,
            num_blocks,
            None if events is None else self._reachable(events.endpoint),
            None if events is None else self._reachable(events.replay_endpoint),
        )

    def _cards(self) -> tuple[Card, ...]:
        content = self._get("/v1/models")
        if content is None:
            if self._model is None:
                raise NotAModelServer("answers but has no /v1/models; name what it serves with --model NAME")
            return (Card(self._model),)
        cards = msgspec.json.decode(content, type=_Cards).data
        if self._model is not None:
            cards = [card for card in cards if card.id == self._model]
        if not cards:
            raise NotAModelServer(
                "answers but serves no model" + (f" named {self._model!r}" if self._model else "")
            )
        return tuple(cards)

    def _event_source(self) -> _EventSource | None:
        """Of the first data-parallel rank; a server with several is not followed."""
        content = self._get("/kv_event_sources")
        if content is None:
            return None
        try:
            sources = msgspec.json.decode(content, type=dict[str, _EventSource])
        except msgspec.MsgspecError:
            return None
        if len(sources) != 1:
            return None
        source = next(iter(sources.values()))
        return source if source.enable_kv_cache_events and source.publisher == "zmq" else None

    def _reachable(self, endpoint: str | None) -> str | None:
        """A wildcard address means the server's own."""
        if endpoint is None or not endpoint.startswith("tcp://"):
            return None
        return endpoint.replace("tcp://*", f"tcp://{urlsplit(self.url).hostname}")

    def _get(self, path: str) -> bytes | None:
        """The body, None where the server has no such path."""
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            if error.code in (404, 405):
                return None
            raise
        except http.client.HTTPException as error:
            raise ValueError(f"does not speak HTTP: {error!r}") from error


def _number(metrics: bytes | None, name: bytes) -> str:
    match = re.search(rb"^%b(?:\{[^}]*\})? (\S+)$" % re.escape(name), metrics or b"", re.MULTILINE)
    return match[1].decode() if match else ""


def _cache_shape(metrics: bytes | None) -> tuple[int | None, int | None]:
    """vLLM's block size and number of blocks, from the labels of its cache_config_info."""
    match = re.search(rb"^vllm:cache_config_info\{([^}]*)\}", metrics or b"", re.MULTILINE)
    if match is None:
        return None, None
    labels = dict(re.findall(rb'(\w+)="([^"]*)"', match[1]))

    def whole(name: bytes) -> int | None:
        value = labels.get(name, b"")
        return int(value) if value.isdigit() else None

    return whole(b"block_size"), whole(b"num_gpu_blocks")
