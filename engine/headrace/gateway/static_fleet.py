"""A fleet without a controller: servers that already run, by URL. Probed once a second; the dead leave the view."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from headrace.gateway.server_probe import Found, NotAModelServer, ServerProbe, check_url
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, ReplicaState, Role

PROBE_INTERVAL_S = 1.0
# A server under load may miss one probe; connection failures in the relay are noticed at once anyway.
MISSES_UNTIL_DOWN = 2


class _Server:
    """What is known of one URL."""

    def __init__(self, probe: ServerProbe) -> None:
        self.probe = probe
        self.found: Found | None = None  # the last good look; kept while it is down
        self.is_up = False
        self.misses = 0
        self.starts = 0  # how often it has come up, as far as looks can tell
        self.problem = ""  # why it is not up

    async def look(self) -> None:
        """Look once. Never raises."""
        try:
            found = await asyncio.to_thread(self.probe.look, self.found if self.is_up else None)
        except NotAModelServer as error:
            self._missed(str(error))
        except (OSError, ValueError) as error:
            self._missed(f"does not answer ({getattr(error, 'reason', error)}); it joins when it does")
        else:
            if not self.is_up or self.found is None or self.found.boot != found.boot:
                self.starts += 1
            self.is_up, self.misses, self.found = True, 0, found

    def _missed(self, problem: str) -> None:
        self.problem = problem
        self.misses += 1
        if self.misses >= MISSES_UNTIL_DOWN:
            self.is_up = False

    def replicas(self, api_key: str | None) -> list[Replica]:
        """A replica per model that it serves."""
        found = self.found
        if found is None:
            return []
        name = urlsplit(self.probe.url).netloc.rpartition("@")[2]
        return [
            Replica(
                id=ReplicaId(name if len(found.cards) == 1 else f"{name}/{card.id}"),
                boot_id=BootId(f"{self.starts}@{found.boot}"),
                model=card.id,
                role=Role.UNIFIED,
                endpoints=Endpoints(self.probe.url, kv_events=found.kv_events, kv_replay=found.kv_replay),
                state=ReplicaState.READY if self.is_up else ReplicaState.FAILED,
                block_size=found.block_size,
                num_blocks=found.num_blocks,
                max_model_len=card.max_model_len,
                api_key=api_key,
            )
            for card in found.cards
        ]


class StaticFleet:
    """A MembershipSource over fixed URLs."""

    def __init__(
        self,
        urls: list[str],
        *,
        api_key: str | None = None,
        model: str | None = None,
        interval_s: float = PROBE_INTERVAL_S,
    ) -> None:
        """`api_key` is sent to the servers; `model` names what they serve when they have no /v1/models.

        Raises ConfigError on something that is not an http(s) URL.
        """
        for url in urls:
            check_url(url)
        self._servers = [_Server(ServerProbe(url.rstrip("/"), api_key, model)) for url in dict.fromkeys(urls)]
        self._api_key = api_key
        self._interval_s = interval_s
        self._version = 0

    async def watch(self, known: Membership | None) -> Membership:
        """Look until something changed; at once, with whatever answers now, when nothing is known yet."""
        if known is not None:
            await asyncio.sleep(self._interval_s)
        await asyncio.gather(*(server.look() for server in self._servers))
        replicas = tuple(replica for server in self._servers for replica in server.replicas(self._api_key))
        if known is not None and replicas == known.replicas:
            return known
        self._version += 1
        return Membership(self._version, replicas)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the servers that are not up, one line each."""
        return [f"{server.probe.url} {server.problem}" for server in self._servers if not server.is_up]
