"""A backend that somebody else runs: nothing is started, only watched.

Any OpenAI-compatible server will do; one that is vLLM also tells its load on /metrics. The standard library's
client is enough for a probe a second, so the gateway alone needs no HTTP client package.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import secrets
import time
import urllib.error
import urllib.request
from typing import Any

from headrace.backends.base import Progress, Started
from headrace.errors import ReplicaUnhealthy, SleepFailed, StartError
from headrace_router.types import BootId, Endpoints, LoadReport, ReplicaId

PROBE_TIMEOUT_S = 5.0
RETRY_S = 0.25
MAX_ANSWER_BYTES = 8 * 1024 * 1024

_GAUGE = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^}]*\})?\s+([0-9.eE+-]+)",
    re.M,
)
# A proxy of the environment is meant for the internet; replicas are reached directly, as the gateway does.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ExternalBackend:
    """Implements `headrace.backends.base.Backend` for one server that already runs."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        *,
        replica_id: ReplicaId | None = None,
        start_timeout_s: float = 10.0,
        report_interval_s: float = 1.0,
    ) -> None:
        """`url` is the server's root, without `/v1`; `model` the name it serves."""
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._replica_id = replica_id or ReplicaId(self._url)
        self._start_timeout_s = start_timeout_s
        self._report_interval_s = report_interval_s
        self._boot_id = BootId("")
        self._load: LoadReport | None = None
        self._sequence = 0
        self._watching: asyncio.Task[None] | None = None

    async def start(self, progress: Progress) -> Started:
        """Wait until the server answers and serves the model.

        Raises StartError naming the URL when it does not within `start_timeout_s`.
        """
        began_s = time.monotonic()
        progress("connecting")
        deadline_s = began_s + self._start_timeout_s
        while True:
            try:
                card = await self._find_model()
                break
            except StartError:
                raise
            except OSError as e:
                if time.monotonic() + RETRY_S >= deadline_s:
                    raise StartError(
                        f"{self._url} did not answer within {self._start_timeout_s:g} s: {_reason(e)};"
                        " check the URL and that the server runs"
                    ) from e
            await asyncio.sleep(RETRY_S)
        self._boot_id = BootId(secrets.token_hex(8))
        await self._read_load()
        if self._load is not None:
            self._watching = asyncio.get_running_loop().create_task(self._watch_load())
        max_model_len = card.get("max_model_len")
        return Started(
            endpoints=Endpoints(self._url),
            boot_id=self._boot_id,
            max_model_len=max_model_len if isinstance(max_model_len, int) else None,
            phases_s=(("connecting", time.monotonic() - began_s),),
        )

    async def check(self) -> None:
        """Raises ReplicaUnhealthy when neither /health nor, where that is unknown, /v1/models answers 200."""
        try:
            try:
                await self._get("/health")
            except urllib.error.HTTPError as e:
                if e.code not in (404, 405):
                    raise
                await self._get("/v1/models")
        except OSError as e:
            raise ReplicaUnhealthy(f"{self._url} is not healthy: {_reason(e)}") from e

    def load(self) -> LoadReport | None:
        """The newest reading of vLLM's /metrics, None where the server is not vLLM."""
        return self._load

    def unfinished(self) -> int:
        """As last read; 0 where the server is not vLLM."""
        return 0 if self._load is None else self._load.running + self._load.waiting

    async def sleep(self) -> None:
        """The server is not ours. Raises SleepFailed."""
        raise SleepFailed(f"{self._url} is somebody else's server; it cannot be put to sleep from here")

    async def wake(self) -> None:
        """It never sleeps."""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop watching. The server and its requests go on: they are not ours."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _find_model(self) -> dict[str, Any]:
        """The server's card of the model. OSError while it does not answer; StartError when it never will."""
        try:
            answer = json.loads(await self._get("/v1/models"))
            cards = [card for card in answer["data"] if isinstance(card, dict)]
        except urllib.error.HTTPError as e:
            if e.code in (401, 403):
                raise StartError(
                    f"{self._url} refused the key (HTTP {e.code}); set api_key of the model"
                ) from e
            raise
        except (ValueError, TypeError, KeyError) as e:
            raise StartError(f"{self._url}/v1/models is not an OpenAI model list; check the URL") from e
        for card in cards:
            if card.get("id") == self._model:
                return card
        served = ", ".join(repr(card.get("id")) for card in cards) or "nothing"
        raise StartError(
            f"{self._url} serves {served}, not {self._model!r}; correct the model's name or its urls"
        )

    async def _watch_load(self) -> None:
        while True:
            await asyncio.sleep(self._report_interval_s)
            await self._read_load()

    async def _read_load(self) -> None:
        try:
            text = (await self._get("/metrics")).decode("utf-8", "replace")
        except OSError:
            return  # `check` is what tells that the server has gone
        # A server with several engines has one line per engine: requests add up, cache use is their mean.
        found: dict[str, list[float]] = {}
        for name, value in _GAUGE.findall(text):
            found.setdefault(name, []).append(float(value))
        if "num_requests_running" not in found:
            return
        kv_use = found.get("kv_cache_usage_perc", [0.0])
        self._sequence += 1
        self._load = LoadReport(
            replica_id=self._replica_id,
            boot_id=self._boot_id,
            sequence=self._sequence,
            running=int(sum(found["num_requests_running"])),
            waiting=int(sum(found.get("num_requests_waiting", []))),
            kv_use=sum(kv_use) / len(kv_use),
            backlog_tokens=0,  # /metrics does not tell
        )

    async def _get(self, path: str) -> bytes:
        """Body of a 2xx answer. Raises urllib.error.HTTPError for any other, OSError when there is none."""
        return await asyncio.to_thread(self._get_blocking, path)

    def _get_blocking(self, path: str) -> bytes:
        try:
            request = urllib.request.Request(self._url + path, headers=self._headers)
            with _opener.open(request, timeout=PROBE_TIMEOUT_S) as answer:
                body: bytes = answer.read(MAX_ANSWER_BYTES)
                return body
        except urllib.error.HTTPError as e:
            e.close()
            raise
        except (http.client.HTTPException, ValueError) as e:
            raise OSError(f"not an HTTP server: {e}") from e


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    return str(error.reason if isinstance(error, urllib.error.URLError) else error)
