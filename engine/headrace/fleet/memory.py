"""What a controller must know again after Ray has restarted it: Ray gives it its arguments and nothing else.

It is kept in the cluster's own key-value store, which lives as long as the cluster's head and reaches every node that
the controller may come back on. (A file would be on one node.) Ray Serve keeps its controller's state there too.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from typing import Any, Protocol

_NAMESPACE = b"headrace"
_TIMEOUT_S = 5


class Memory(Protocol):
    """Keeps one JSON value."""

    async def load(self) -> Any:
        """What was saved last, None where nothing was. Raises when it cannot be read."""
        ...

    async def save(self, value: Any) -> None: ...

    async def clear(self) -> None: ...


class ClusterMemory:
    """In Ray's key-value store, under the fleet's name and its token: a later fleet of that name finds nothing."""

    def __init__(self, fleet: str, internal_token: str) -> None:
        digest = hashlib.sha256(internal_token.encode()).hexdigest()[:16]
        self._key = f"{fleet}/{digest}".encode()

    async def load(self) -> Any:
        kept = await asyncio.to_thread(
            self._client.internal_kv_get, self._key, namespace=_NAMESPACE, timeout=_TIMEOUT_S
        )
        return None if kept is None else json.loads(kept)

    async def save(self, value: Any) -> None:
        await asyncio.to_thread(
            self._client.internal_kv_put,
            self._key,
            json.dumps(value).encode(),
            overwrite=True,
            namespace=_NAMESPACE,
            timeout=_TIMEOUT_S,
        )

    async def clear(self) -> None:
        await asyncio.to_thread(
            self._client.internal_kv_del, self._key, False, namespace=_NAMESPACE, timeout=_TIMEOUT_S
        )

    @functools.cached_property
    def _client(self) -> Any:
        # As ray.serve._private.storage.kv_store does it.
        import ray
        import ray._raylet

        return ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
