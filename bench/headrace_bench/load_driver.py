"""Runs planned conversations against a server from one event loop, bounded in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from headrace_bench.client_health import ClientHealth, HealthWatch
from headrace_bench.exchange import Exchange, answer_of
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.outcome import Outcome
from headrace_bench.prompt_text import render
from headrace_bench.workload import Conversation, Turn


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What one process of the load generator has to do. Frozen and picklable."""

    target: Target
    model: str
    conversations: tuple[Conversation, ...]
    users: int | None = None  # closed loop with that many; None: open loop, conversations have start times
    endpoint: Literal["chat", "completions"] = "chat"
    streamed: bool = True
    ignore_eos: bool = False  # vLLM's and SGLang's extension: answers have the length asked for
    session_header: str | None = None  # its value is the conversation, for policies with affinity
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields, e.g. temperature
    seed: int = 0
    duration_s: float = 300.0  # nothing is sent later than this
    timeout_s: float = 120.0  # per request, from sending to the last byte


@dataclass(frozen=True, slots=True)
class DriverResult:
    outcomes: tuple[Outcome, ...]
    health: ClientHealth
    dropped: int  # planned, not sent: time was up, a turn before it failed, or the run was stopped


@dataclass(slots=True)
class Counts:
    """Of a run under way, for a progress bar."""

    ended: int = 0
    failed: int = 0
    in_flight: int = 0
    output_tokens: int = 0


class Talk:
    """One conversation under way: remembers what was said."""

    def __init__(self, job: LoadJob, conversation: Conversation) -> None:
        self.job = job
        self.conversation = conversation
        self.prompt_tokens = 0  # expected tokens of everything said so far
        self._messages: list[dict[str, str]] = []
        if conversation.system is not None:
            self._messages.append({"role": "system", "content": render(job.seed, (conversation.system,))})

    def ask(self, turn: Turn) -> bytes:
        """The body of the next request. Mutates: the turn has been said."""
        job = self.job
        self._messages.append({"role": "user", "content": render(job.seed, turn.user)})
        self.prompt_tokens += turn.new_tokens
        body: dict[str, Any] = {"model": job.model, "max_tokens": turn.output_tokens, "stream": job.streamed}
        if job.endpoint == "chat":
            body["messages"] = self._messages
        else:
            body["prompt"] = "".join(message["content"] for message in self._messages)
        if job.streamed:
            body["stream_options"] = {"include_usage": True}
        if job.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body | dict(job.body))

    def answered(self, text: str, tokens: int) -> None:
        """The server's answer, part of every later prompt."""
        self._messages.append({"role": "assistant", "content": text})
        self.prompt_tokens += tokens


class LoadDriver:
    """Runs one `LoadJob`. Mutable, single use."""

    def __init__(self, job: LoadJob) -> None:
        self.job = job
        self.counts = Counts()
        self._client = LoadClient(job.target)
        self._outcomes: list[Outcome] = []
        self._began_s = 0.0
        self._sent = 0
        self._stopping = asyncio.Event()
        self._path = "/v1/chat/completions" if job.endpoint == "chat" else "/v1/completions"

    def stop(self) -> None:
        """Send nothing more and leave what is in flight. Safe at any time and twice."""
        self._stopping.set()

    async def run(self, began_s: float) -> DriverResult:
        """Drive the whole job. `began_s` is the run's start on `time.monotonic()`; it may lie ahead.

        Ends by itself at most `duration_s + timeout_s` after `began_s`.
        """
        self._began_s = began_s
        health = HealthWatch()
        health.start()
        work = asyncio.create_task(self._open() if self.job.users is None else self._closed(self.job.users))
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                work.cancel()
            stop.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
            self._client.close()
        if not work.cancelled():
            work.result()
        watched = health.stop([outcome.late_s for outcome in self._outcomes])
        planned = sum(len(conversation.turns) for conversation in self.job.conversations)
        return DriverResult(tuple(self._outcomes), watched, planned - self._sent)

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as talks:
            for conversation in self.job.conversations:
                # The body is made before its moment, so that making it delays nothing.
                talk = Talk(self.job, conversation)
                body = talk.ask(conversation.turns[0])
                due_s = self._began_s + (conversation.start_s or 0.0)
                if not await self._sleep_until(due_s):
                    return
                talks.create_task(self._converse(talk, body, due_s))

    async def _closed(self, users: int) -> None:
        await self._sleep_until(self._began_s)
        waiting = iter(self.job.conversations)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(users, len(self.job.conversations))):
                tasks.create_task(self._user(waiting))

    async def _user(self, waiting: Iterator[Conversation]) -> None:
        for conversation in waiting:
            if self._late():
                return
            talk = Talk(self.job, conversation)
            body = talk.ask(conversation.turns[0])
            await self._converse(talk, body, time.monotonic())

    async def _converse(self, talk: Talk, body: bytes, due_s: float) -> None:
        turns = talk.conversation.turns
        for number, turn in enumerate(turns):
            if number:
                body = talk.ask(turn)
                due_s += turn.think_s
                if not await self._sleep_until(due_s):
                    return
            outcome, text = await self._request(talk, number, body, due_s)
            self._outcomes.append(outcome)
            if outcome.error is not None:
                return  # what follows would build on an answer that never came
            talk.answered(text, outcome.output_tokens)
            due_s = time.monotonic()

    async def _request(self, talk: Talk, number: int, body: bytes, due_s: float) -> tuple[Outcome, str]:
        job = self.job
        headers = {job.session_header: f"c{job.seed}-{talk.conversation.id}"} if job.session_header else None
        self._sent += 1
        self.counts.in_flight += 1
        try:
            exchange = await self._client.exchange(
                "POST", self._path, body, streamed=job.streamed, timeout_s=job.timeout_s, headers=headers
            )
        except asyncio.CancelledError:
            self._sent -= 1  # stopped by hand: neither answered nor failed
            raise
        finally:
            self.counts.in_flight -= 1
        outcome, text = self._outcome(talk, number, exchange, due_s)
        self.counts.ended += 1
        self.counts.failed += outcome.error is not None
        self.counts.output_tokens += outcome.output_tokens
        return outcome, text

    def _outcome(self, talk: Talk, number: int, exchange: Exchange, due_s: float) -> tuple[Outcome, str]:
        error, detail, text, usage = exchange.error, exchange.detail, "", exchange.usage
        if error is None:
            try:
                text, usage = answer_of(exchange)
            except ValueError as wrong:
                error, detail = "bad_response", str(wrong)[:200]
        chunks = len(exchange.text)
        counted = usage is not None and usage.completion_tokens is not None
        replica = exchange.headers.get(b"x-headrace-replica")
        outcome = Outcome(
            conversation=talk.conversation.id,
            turn=number,
            measured=talk.conversation.measured,
            sent_s=exchange.sent_s - self._began_s,
            late_s=max(0.0, exchange.sent_s - due_s),
            e2e_s=exchange.end_s - exchange.sent_s,
            ttft_s=None if exchange.first_s is None else exchange.first_s - exchange.sent_s,
            gaps_s=exchange.gaps_s,
            planned_tokens=talk.prompt_tokens,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            output_tokens=(usage.completion_tokens or 0) if usage and counted else chunks,
            counted=counted,
            replica=replica.decode("latin-1") if replica else None,
            error=error,
            detail=detail,
        )
        return outcome, text

    async def _sleep_until(self, due_s: float) -> bool:
        """False: that moment is after the run's end, nothing may be sent."""
        if due_s > self._began_s + self.job.duration_s:
            return False
        # uvloop's timers tick in whole milliseconds and may come early by a part of one.
        while (left_s := due_s - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        return not self._late()

    def _late(self) -> bool:
        return time.monotonic() > self._began_s + self.job.duration_s


def split_job(job: LoadJob, processes: int) -> Sequence[LoadJob]:
    """Deal conversations and users out to `processes` jobs, round robin; some may get nothing to do."""
    return tuple(
        replace(
            job,
            conversations=job.conversations[part::processes],
            users=None if job.users is None else job.users // processes + (part < job.users % processes),
        )
        for part in range(processes)
    )
