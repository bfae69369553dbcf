"""A fleet without a controller: servers that already run, by URL. Probed once a second; the dead leave the view."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from headrace.errors import ConfigError
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, ReplicaState, Role

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 2.0
# A server under load may miss one probe; connection failures in the relay are noticed at once anyway.
MISSES_UNTIL_DOWN = 2


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


@dataclass(slots=True)
class _Server:
    """What is known of one URL."""

    url: str
    models: tuple[_Card, ...] = ()
    up: bool = False
    misses: int = 0
    problem: str = ""  # why it is not up
    starts: int = 0  # how often it has come up, as far as probes can tell


class _NotAModelServer(Exception):
    """Something answers at the URL, and it does not say what it serves."""


def _check(url: str) -> None:
    """Raises ConfigError on what cannot be a backend."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        is_good = False
    if not is_good or parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(f"not a backend URL: {url!r}; give http://HOST:PORT and nothing behind it")


class StaticFleet:
    """A MembershipSource over fixed URLs."""

    def __init__(self, urls: list[str], *, api_key: str | None = None, model: str | None = None) -> None:
        """`api_key` is sent to the servers; `model` names what they serve when they have no /v1/models.

        Raises ConfigError on something that is not an http(s) URL.
        """
        for url in urls:
            _check(url)
        self._servers = [_Server(url.rstrip("/")) for url in dict.fromkeys(urls)]
        self._api_key = api_key
        self._model = model
        self._version = 0

    async def watch(self, known: Membership | None) -> Membership:
        """Probe until something changed; at once, with whatever answers now, when nothing is known yet."""
        if known is not None:
            await asyncio.sleep(PROBE_INTERVAL_S)
        before = self._replicas()
        await asyncio.gather(*(self._probe(server) for server in self._servers))
        replicas = self._replicas()
        if known is not None and replicas == before:
            return known
        self._version += 1
        return Membership(self._version, replicas)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the servers that are not up, one line each."""
        return [f"{server.url} {server.problem}" for server in self._servers if not server.up]

    def _replicas(self) -> tuple[Replica, ...]:
        replicas = []
        for server in self._servers:
            for card in server.models:
                name = urlsplit(server.url).netloc.rpartition("@")[2]
                replicas.append(
                    Replica(
                        id=ReplicaId(name if len(server.models) == 1 else f"{name}/{card.id}"),
                        boot_id=BootId(str(server.starts)),
                        model=card.id,
                        role=Role.UNIFIED,
                        endpoints=Endpoints(server.url),
                        state=ReplicaState.READY if server.up else ReplicaState.FAILED,
                        max_model_len=card.max_model_len,
                        api_key=self._api_key,
                    )
                )
        return tuple(replicas)

    async def _probe(self, server: _Server) -> None:
        try:
            models = await asyncio.to_thread(self._ask, server)
        except _NotAModelServer as error:
            server.problem = str(error)
            server.misses += 1
        except (OSError, ValueError) as error:
            server.problem = f"does not answer ({getattr(error, 'reason', error)}); it joins when it does"
            server.misses += 1
        else:
            if not server.up:
                server.starts += 1
            server.up, server.misses, server.models = True, 0, models
            return
        if server.misses >= MISSES_UNTIL_DOWN:
            server.up = False

    def _ask(self, server: _Server) -> tuple[_Card, ...]:
        """Blocking; in a thread. Raises OSError or ValueError when the server does not answer as one."""
        if server.models and self._get(server.url + "/health") is not None:
            return server.models
        content = self._get(server.url + "/v1/models")
        if content is None:
            if self._model is None:
                raise _NotAModelServer("answers but has no /v1/models; name what it serves with --model NAME")
            self._get(server.url + "/health")
            return (_Card(self._model),)
        cards = msgspec.json.decode(content, type=_Cards).data
        if self._model is not None:
            cards = [card for card in cards if card.id == self._model]
        if not cards:
            raise _NotAModelServer(
                "answers but serves no model" + (f" named {self._model!r}" if self._model else "")
            )
        return tuple(cards)

    def _get(self, url: str) -> bytes | None:
        """The body, None where the server has no such path."""
        headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=PROBE_TIMEOUT_S
            ) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            if error.code in (404, 405):
                return None
            raise
