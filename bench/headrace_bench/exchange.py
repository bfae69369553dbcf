"""One request of the load client and what came back, read as it comes."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass, field

import msgspec

from headrace_bench.answer_stream import EventSplitter, Usage, decode_answer, error_message

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Of one answer that is no stream, so that a server cannot fill the client's memory."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what came back. Filled by its connection; complete once `done` is."""

    done: asyncio.Future[None]
    streamed: bool
    sent_s: float = 0.0
    first_s: float | None = None  # first content
    last_s: float = 0.0  # newest content
    end_s: float = 0.0
    gaps_s: array[float] = field(default_factory=lambda: array("f"))  # between contents
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)  # of answers that are not streams
    text: list[str] = field(default_factory=list)
    usage: Usage | None = None
    finished: bool = False  # a finish_reason or [DONE] came
    error: str | None = None  # kind: connect, timeout, cut, bad_response, stream_error, http_NNN
    detail: str = ""
    events: EventSplitter = field(default_factory=EventSplitter)

    def fail(self, kind: str, detail: str) -> None:
        """End with an error. The first one stands; safe at any time."""
        if self.error is None and not self.done.done():
            self.error, self.detail = kind, detail
        self.finish()

    def finish(self) -> None:
        """End. Safe at any time and twice."""
        if not self.done.done():
            self.end_s = time.monotonic()
            self.done.set_result(None)

    def receive(self, data: bytes, now_s: float) -> None:
        """A piece of the body. Raises `ValueError` (msgspec's included) on what is no answer."""
        if not self.streamed or self.status != 200:
            self.body += data
            if len(self.body) > MAX_BODY_BYTES:
                raise ValueError(f"an answer is over {MAX_BODY_BYTES} bytes")
            return
        for payload in self.events.feed(data):
            if payload == b"[DONE]":
                self.finished = True
            elif payload:
                self._chunk(payload, now_s)

    def _chunk(self, payload: bytes, now_s: float) -> None:
        answer = decode_answer(payload)
        if answer.usage is not None:
            self.usage = answer.usage
        if answer.error is not None and self.error is None:
            self.error, self.detail = "stream_error", error_message(payload)
        for choice in answer.choices:
            said = choice.said
            if choice.finish_reason is not None:
                self.finished = True
            if said is not None:
                self.text.append(said)
                if self.first_s is None:
                    self.first_s = now_s
                else:
                    self.gaps_s.append(now_s - self.last_s)
                self.last_s = now_s

    def complete(self) -> None:
        """The whole response has come."""
        if self.status != 200:
            self.fail(f"http_{self.status}", error_message(bytes(self.body)))
        elif self.streamed and not self.finished:
            self.fail(
                "cut", f"the stream ended after {len(self.text)} chunks without [DONE] or a finish_reason"
            )
        else:
            self.finish()


def answer_of(exchange: Exchange) -> tuple[str, Usage | None]:
    """Text and usage of a completed exchange, streamed or whole. Raises `ValueError` on what is no answer."""
    if exchange.streamed:
        return "".join(exchange.text), exchange.usage
    try:
        answer = decode_answer(bytes(exchange.body))
    except msgspec.DecodeError as error:
        raise ValueError(f"no answer: {error}") from error
    return "".join(choice.said or "" for choice in answer.choices), answer.usage
