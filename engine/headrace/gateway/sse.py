"""Server-sent events on their way through: whole events only, usage read, an unasked usage event taken out.

Forwarding only whole events costs one `endswith` on the usual read and buys two things: an error event can be put in
cleanly when a replica dies in the middle, and an event is never half-hidden when it must be taken out.
"""

from __future__ import annotations

from headrace.gateway.openai import Usage, find_usage

# A single event larger than this (a whole image, say) is passed on in pieces.
MAX_HELD_BYTES = 1024 * 1024


class EventRelay:
    """Feed what arrives, forward what `feed` returns, and `rest` at the end. `usage` is what has been seen."""

    __slots__ = ("_held", "_hide_usage", "usage")

    def __init__(self, hide_usage: bool) -> None:
        self._held = b""
        self._hide_usage = hide_usage
        self.usage: Usage | None = None

    @property
    def holds(self) -> bool:
        """Whether part of an event waits for its end."""
        return bool(self._held)

    def feed(self, data: bytes) -> bytes:
        """The bytes to forward now: whole events. May be empty."""
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
            whole = cut if cut > 3 else 0
            if len(data) - whole <= MAX_HELD_BYTES:
                self._held = data[whole:]
                data = data[:whole]
        if b'"usage":' in data:
            data = self._read_usage(data)
        return data

    def rest(self) -> bytes:
        """What is left when the stream has ended in the middle of an event: the replica's business, passed on."""
        rest, self._held = self._held, b""
        return rest

    def _read_usage(self, data: bytes) -> bytes:
        forward = []
        for event in data.split(b"\n\n"):
            usage = find_usage(event)
            if usage is not None:
                known = self.usage or usage
                # Anthropic's form spreads the counts over two events, each giving what it knows: keep the larger.
                self.usage = Usage(*map(max, known, usage))
                if self._hide_usage and b'"choices":[]' in event:
                    continue
            forward.append(event)
        return b"\n\n".join(forward)
