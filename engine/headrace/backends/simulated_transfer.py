"""How simulated replicas hand blocks over: the side channel of one, and the way to another's. JSON lines over TCP.

    decoding replica ── {"fetch": id} ──> prefilling replica     ── {"tokens": n}, or {} when nothing is held ──>
                     ── {"done": id}  ──>                        frees the blocks

As with vLLM's NixlConnector, who fetches connects to who holds, and a hold ends with the fetch, by request, or with
its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from headrace.backends import ports
from headrace.backends.ports import PortRange

_PATIENCE_S = 5.0
"""For a holder that does not answer: it is taken for dead, and the prompt is computed again."""


class NotHeld(Exception):
    """The blocks are not to be had: expired, released, or their replica is gone."""


class SideChannel:
    """Answers other replicas between `start` and `stop`."""

    def __init__(
        self,
        host: str,
        held: Callable[[str], int | None],
        free: Callable[[str], None],
        port_range: PortRange | None = None,
    ) -> None:
        """`held` tells how many tokens are held for a request; `free` lets them go, and is always safe."""
        self.host = host
        self.port = 0
        self._held = held
        self._free = free
        self._ports = port_range
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Bind a free port. Raises StartError."""
        self._server = await asyncio.start_server(self._serve, sock=ports.bind(self.host, self._ports))
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection. Safe twice and before `start`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while line := await reader.readline():
                asked = json.loads(line)
                if "done" in asked:
                    self._free(str(asked["done"]))
                    continue
                tokens = self._held(str(asked.get("fetch")))
                writer.write(json.dumps({} if tokens is None else {"tokens": tokens}).encode() + b"\n")
        except (OSError, ValueError, asyncio.CancelledError):
            pass
        finally:
            self._serving.discard(task)
            writer.close()


async def fetch(source: Mapping[str, Any], takes_s: float) -> int:
    """Fetch what `source` (kv_transfer_params) names, which takes so long; returns its tokens. Raises NotHeld."""
    try:
        async with asyncio.timeout(_PATIENCE_S + takes_s):
            reader, writer = await asyncio.open_connection(source["remote_host"], source["remote_port"])
            try:
                request_id = source["remote_request_id"]
                writer.write(json.dumps({"fetch": request_id}).encode() + b"\n")
                held = json.loads(await reader.readline() or b"{}")
                if "tokens" not in held:
                    raise NotHeld(f"nothing is held for {request_id}")
                await asyncio.sleep(takes_s)
                writer.write(json.dumps({"done": request_id}).encode() + b"\n")
                await writer.drain()
                return int(held["tokens"])
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise NotHeld(f"they did not come: {error}") from error
