"""The access log: one JSON line per request, written in batches: no request waits for a disk or a terminal."""

from __future__ import annotations

import time
from typing import IO

import msgspec

from headrace.gateway.openai import Usage

_encode = msgspec.json.Encoder().encode
# A reader that stops reading (a full pipe) must not fill our memory.
MAX_BUFFERED_BYTES = 4 * 1024 * 1024


class AccessLog:
    """Collects lines; `take` and `put`, a few times a second, write them out."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._buffered = 0
        self.dropped = 0  # lines lost to a reader that does not keep up

    def write(
        self,
        *,
        request_id: bytes,
        path: bytes,
        model: str | None,
        status: int,
        error: str | None,
        replica: str | None,
        prefill: str | None = None,
        tries: int,
        duration_s: float,
        ttft_s: float | None,
        usage: Usage | None,
        tenant: str | None = None,
        waited_s: float | None = None,
    ) -> None:
        """Add one line. `tenant` and `waited_s` of a request that had to wait in the gateway."""
        line = _encode(
            {
                "time": round(time.time(), 3),
                "request_id": request_id.decode(),
                "path": path.decode("latin-1"),
                "model": model,
                "status": status,
                "error": error,
                "replica": replica,
                "prefill": prefill,
                "tries": tries,
                "duration_ms": round(duration_s * 1000, 2),
                "ttft_ms": None if ttft_s is None else round(ttft_s * 1000, 2),
                "tenant": tenant,
                "queue_ms": None if waited_s is None else round(waited_s * 1000, 2),
                "prompt_tokens": usage.prompt_tokens if usage else None,
                "cached_tokens": usage.cached_tokens if usage else None,
                "completion_tokens": usage.completion_tokens if usage else None,
            }
        )
        if self._buffered + len(line) > MAX_BUFFERED_BYTES:
            self.dropped += 1
            return
        self._lines.append(line)
        self._buffered += len(line) + 1

    def take(self) -> bytes:
        """Everything collected since the last call, as text to write."""
        if not self._lines:
            return b""
        text = b"\n".join(self._lines) + b"\n"
        self._lines.clear()
        self._buffered = 0
        return text

    def put(self, text: bytes) -> None:
        """Write to the stream; may block (call it in a thread). A broken stream ends the log, never the gateway."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped += text.count(b"\n")
