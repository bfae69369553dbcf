"""The side of an exchange that faces the client: what a face (protocol or ASGI) offers to the relay."""

from __future__ import annotations

from typing import Protocol


class Client(Protocol):
    """Writes are buffered until `flush`; none of them blocks."""

    def send_head(self, status: int, fields: bytes, content_length: int | None) -> None:
        """`fields`: header lines, each ended by CRLF, without those that frame the body."""
        ...

    def send_body(self, data: bytes) -> None: ...

    def send_chunk(self, framed: bytes, start: int) -> None:
        """Send a chunk at once, as it came (payload `framed[start:-2]`). Nothing may be waiting for `flush`."""
        ...

    def end(self) -> None:
        """The response is complete and the client may send its next request. Flushes."""
        ...

    def flush(self) -> None: ...

    def abort(self) -> None:
        """Cut the connection: the response cannot be completed and must not look complete."""
        ...
