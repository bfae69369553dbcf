"""Whole runs of the load generator against a real server on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from headrace.errors import CallerError
from headrace_bench import bench_command
from headrace_bench.client_health import ClientHealth, complaints
from headrace_bench.load import run_load
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_driver import Counts, DriverResult, LoadDriver, LoadJob, split_job
from headrace_bench.load_probe import ProbeError, ServerFacts, Unreachable, probe
from headrace_bench.load_summary import summarise
from headrace_bench.prompt_text import Calibration
from headrace_bench.trace import TraceRecord
from headrace_bench.workload import (
    Conversation,
    Replay,
    Span,
    Synthetic,
    mark_warm_up,
    plan_replay,
    plan_synthetic,
    start_poisson,
)


class Echo:
    """A chat server of one word per token that remembers what it was asked.

    Its cache is perfect: every leading message that it has seen before counts as cached. `behave` may be changed
    to make it slow ("hang") or refuse ("busy").
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.heads: list[bytes] = []
        self.behave = "well"
        self.in_flight = 0
        self.most_in_flight = 0
        self.tokenizes = True
        self.asked = asyncio.Event()  # two requests are in flight
        self._seen: set[str] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                if self.in_flight == 2:
                    self.asked.set()
                try:
                    if self.behave == "hang" and b"/v1/models" not in head and b"/tokenize" not in head:
                        await reader.read()
                        return
                    writer.write(self.answer(head, body))
                    await writer.drain()
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, head: bytes, body: bytes) -> bytes:
        path = head.split(b" ")[1]
        if path == b"/v1/models":
            return plain({"data": [{"id": "echo", "owned_by": "vllm"}]})
        if path == b"/tokenize":
            if not self.tokenizes:
                return plain({"error": {"message": "no such path"}}, "404 Not Found")
            return plain({"count": self.count(json.loads(body))})
        if self.behave == "busy":
            return plain({"error": {"message": "come back later"}}, "503 Busy")
        asked = json.loads(body)
        self.bodies.append(asked)
        self.heads.append(head)
        usage = {
            "prompt_tokens": self.count(asked),
            "completion_tokens": asked["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": self.cached(asked.get("messages", []))},
        }
        if not asked.get("stream"):
            choice = {"message": {"content": " ok" * asked["max_tokens"]}, "finish_reason": "length"}
            return plain({"choices": [choice], "usage": usage})
        key = "text" if "prompt" in asked else "delta"
        chunk = {"choices": [{key: " ok" if key == "text" else {"content": " ok"}}]}
        events = [chunk] * asked["max_tokens"] + [{"choices": [], "usage": usage}]
        data = "".join(f"data: {json.dumps(one)}\n\n" for one in events) + "data: [DONE]\n\n"
        return plain(data.encode(), more="x-headrace-replica: echo-0\r\n")

    def count(self, asked: dict[str, object]) -> int:
        """A word is a token; a chat adds 7, a message 3."""
        if "prompt" in asked:
            return len(str(asked["prompt"]).split())
        messages = asked["messages"]
        assert isinstance(messages, list)
        return 7 + sum(len(message["content"].split()) + 3 for message in messages)

    def cached(self, messages: Sequence[dict[str, str]]) -> int:
        cached = 0
        for end in range(1, len(messages) + 1):
            prefix = json.dumps(messages[:end])
            if prefix in self._seen:
                cached = self.count({"messages": messages[:end]})
            self._seen.add(prefix)
        return cached


def plain(body: object, status: str = "200 OK", more: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n{more}\r\n".encode() + data


@asynccontextmanager
async def running(echo: Echo) -> AsyncIterator[str]:
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def job_of(url: str, conversations: tuple[Conversation, ...], **more: object) -> LoadJob:
    return replace(LoadJob(Target.parse(url), "echo", conversations), **more)  # type: ignore[arg-type]


async def drive(job: LoadJob) -> tuple[LoadDriver, DriverResult]:
    driver = LoadDriver(job)
    return driver, await driver.run(time.monotonic())


SMALL = Synthetic(requests=12, prompt_tokens=Span(4, 8), output_tokens=Span(2, 5))
TALKS = replace(SMALL, turns=3, system_prompts=2, system_tokens=10)


async def test_a_closed_loop_keeps_no_more_in_flight_than_it_has_users() -> None:
    echo = Echo()
    async with running(echo) as url:
        driver, result = await drive(job_of(url, plan_synthetic(SMALL, Calibration(), 0), users=3))
    assert len(result.outcomes) == 12
    assert echo.most_in_flight <= 3
    assert driver.counts == Counts(12, 0, 0, sum(outcome.output_tokens for outcome in result.outcomes))
    assert result.dropped == 0


async def test_an_open_loop_sends_every_request_at_its_time() -> None:
    echo = Echo()
    plan = start_poisson(plan_synthetic(SMALL, Calibration(), 0), 200.0, 0)
    async with running(echo) as url:
        _, result = await drive(job_of(url, plan))
    starts = {conversation.id: conversation.start_s or 0.0 for conversation in plan}
    assert len(result.outcomes) == 12
    for outcome in result.outcomes:
        assert outcome.sent_s >= starts[outcome.conversation]
        assert outcome.late_s == pytest.approx(outcome.sent_s - starts[outcome.conversation], abs=1e-6)


async def test_a_turn_says_everything_said_before_and_the_servers_answer() -> None:
    echo = Echo()
    async with running(echo) as url:
        _, result = await drive(job_of(url, plan_synthetic(TALKS, Calibration(), 0), users=1))
    last = next(body for body in echo.bodies if len(body["messages"]) == 6)  # type: ignore[arg-type]
    messages = last["messages"]
    assert isinstance(messages, list)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert set(messages[2]["content"].split()) == {"ok"}
    assert [outcome.turn for outcome in result.outcomes] == [0, 1, 2] * 4
    summary = summarise(result.outcomes)
    assert [turn.turn for turn in summary.turns] == [1, 2, 3]
    assert summary.turns[2].cached_share is not None
    assert summary.turns[2].cached_share > 0.5
    assert summary.replicas == {"echo-0": 12}


async def test_the_same_seed_sends_the_same_bytes() -> None:
    sent = []
    for seed in (5, 5, 6):
        echo = Echo()
        async with running(echo) as url:
            await drive(job_of(url, plan_synthetic(TALKS, Calibration(), seed), users=1, seed=seed))
        sent.append(echo.bodies)
    assert sent[0] == sent[1] != sent[2]


async def test_options_of_the_job_reach_the_server() -> None:
    echo = Echo()
    async with running(echo) as url:
        conversations = plan_synthetic(replace(SMALL, requests=1), Calibration(), 0)
        more = {"ignore_eos": True, "session_header": "x-session-id", "body": {"temperature": 0}}
        _, result = await drive(job_of(url, conversations, users=1, endpoint="completions", seed=4, **more))
    (body,) = echo.bodies
    assert isinstance(body["prompt"], str)
    assert (body["ignore_eos"], body["temperature"], body["stream_options"]) == (
        True,
        0,
        {"include_usage": True},
    )
    assert b"x-session-id: c4-0\r\n" in echo.heads[0]
    assert b"POST /v1/completions " in echo.heads[0]
    assert len(result.outcomes[0].gaps_s) == result.outcomes[0].output_tokens - 1


async def test_whole_answers_have_an_end_and_no_first_token() -> None:
    echo = Echo()
    async with running(echo) as url:
        _, result = await drive(job_of(url, plan_synthetic(SMALL, Calibration(), 0), users=2, streamed=False))
    summary = summarise(result.outcomes)
    assert summary.e2e_s is not None
    assert (summary.succeeded, summary.ttft_s, summary.itl_s) == (12, None, None)


async def test_a_failed_turn_ends_its_conversation_and_counts_the_rest_as_dropped() -> None:
    echo = Echo()
    echo.behave = "busy"
    async with running(echo) as url:
        _, result = await drive(job_of(url, plan_synthetic(TALKS, Calibration(), 0), users=2))
    summary = summarise(result.outcomes)
    assert summary.errors == {"http_503": 4}
    assert summary.error_details == {"http_503": "come back later"}
    assert result.dropped == 8


async def test_a_silent_server_costs_no_more_than_the_timeout() -> None:
    echo = Echo()
    echo.behave = "hang"
    async with running(echo) as url:
        _, result = await drive(
            job_of(url, plan_synthetic(SMALL, Calibration(), 0), users=12, timeout_s=0.05)
        )
    assert summarise(result.outcomes).errors == {"timeout": 12}


async def test_nothing_is_sent_after_the_duration() -> None:
    echo = Echo()
    plan = tuple(
        replace(one, start_s=3600.0 * (one.id > 5)) for one in plan_synthetic(SMALL, Calibration(), 0)
    )
    async with running(echo) as url:
        _, result = await drive(job_of(url, plan, duration_s=60.0))
    assert (len(result.outcomes), result.dropped) == (6, 6)


async def test_a_stopped_run_leaves_what_is_in_flight_and_keeps_what_ended() -> None:
    echo = Echo()
    async with running(echo) as url:
        driver = LoadDriver(job_of(url, plan_synthetic(SMALL, Calibration(), 0), users=2))
        echo.behave = "hang"
        run = asyncio.create_task(driver.run(time.monotonic()))
        await echo.asked.wait()
        driver.stop()
        result = await run
    assert (result.outcomes, result.dropped, driver.counts.in_flight) == ((), 12, 0)


@pytest.mark.parametrize("processes", [1, 2])
async def test_client_processes_share_the_work(processes: int) -> None:
    echo = Echo()
    plan = mark_warm_up(plan_synthetic(SMALL, Calibration(), 0), 2)
    told: list[Counts] = []
    async with running(echo) as url:
        run = await asyncio.to_thread(run_load, job_of(url, plan, users=4), processes, told.append)
    assert len(run.clients) == processes
    assert sorted(outcome.conversation for outcome in run.outcomes) == list(range(12))
    assert summarise(run.outcomes).requests == 10
    assert (told[-1].ended, told[-1].in_flight, run.dropped, run.stopped) == (12, 0, 0, False)


async def test_a_report_larger_than_a_pipe_arrives_whole() -> None:
    plan = plan_synthetic(Synthetic(50, Span(4, 4), Span(2000, 2000)), Calibration(), 0)
    async with running(Echo()) as url:
        run = await asyncio.to_thread(run_load, job_of(url, plan, users=8), 1)
    assert [len(outcome.gaps_s) for outcome in run.outcomes] == [1999] * 50


def test_splitting_a_job_loses_no_conversation_and_no_user() -> None:
    job = job_of("http://a", plan_synthetic(SMALL, Calibration(), 0), users=7)
    parts = split_job(job, 3)
    assert [part.users for part in parts] == [3, 2, 2]
    assert {one.id for part in parts for one in part.conversations} == set(range(12))


def test_a_number_of_processes_out_of_bounds_is_refused() -> None:
    with pytest.raises(CallerError, match=r"1\.\.64"):
        run_load(job_of("http://a", ()), 0)


@pytest.mark.parametrize("tokenizes", [True, False])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_the_probe_learns_what_a_word_costs(
    endpoint: Literal["chat", "completions"], tokenizes: bool
) -> None:
    echo = Echo()
    echo.tokenizes = tokenizes
    async with running(echo) as url:
        facts = await probe(LoadClient(Target.parse(url)), None, endpoint)
    source = "tokenize" if tokenizes else "usage"
    told = Calibration(1.0, 10.0, 3.0, 6.0, source) if endpoint == "chat" else Calibration(source=source)
    assert facts == ServerFacts("echo", True, told)


async def test_the_lengths_of_conversations_are_foretold() -> None:
    async with running(Echo()) as url:
        facts = await probe(LoadClient(Target.parse(url)), "echo", "chat")
        plan = plan_synthetic(replace(TALKS, prompt_tokens=Span(20, 40)), facts.calibration, 0)
        _, result = await drive(job_of(url, plan, users=2))
    assert summarise(result.outcomes).prompt_error == 0.0


async def test_a_calibrated_replay_has_the_lengths_of_its_trace() -> None:
    echo = Echo()
    records = [TraceRecord(0.0, 700, 2, (0, 1)), TraceRecord(0.0, 1024, 2, (0, 2)), TraceRecord(0.0, 90, 2)]
    async with running(echo) as url:
        facts = await probe(LoadClient(Target.parse(url)), "echo", "chat")
        _, result = await drive(job_of(url, plan_replay(records, Replay(), facts.calibration)))
    assert sorted(outcome.prompt_tokens or 0 for outcome in result.outcomes) == [90, 700, 1024]
    assert summarise(result.outcomes).prompt_error == 0.0


async def test_the_probe_names_what_is_served_instead() -> None:
    echo = Echo()
    async with running(echo) as url:
        with pytest.raises(ProbeError, match="'other'; it serves echo"):
            await probe(LoadClient(Target.parse(url)), "other", "chat")
        echo.tokenizes, echo.behave = False, "busy"
        with pytest.raises(ProbeError, match="come back later"):
            await probe(LoadClient(Target.parse(url)), None, "chat")
    with pytest.raises(Unreachable, match="is the server running"):
        await probe(LoadClient(Target.parse(url)), None, "chat")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_command.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["bench", *words])


async def test_the_command_prints_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    echo = Echo()
    async with running(echo) as url:
        options = (
            *("--url", url, "--users", "3", "--requests", "12", "--turns", "3", "--warmup", "3"),
            *("--system-prompts", "2", "--system-tokens", "9", "--output-tokens", "4", "--slo-ttft", "60"),
            *(
                "--header",
                "x-team: <b>",
                "--json",
                str(tmp_path / "out.json"),
                "--report",
                str(tmp_path / "report"),
            ),
        )
        assert await asyncio.to_thread(bench_command.run, arguments(*options)) == 0
    assert b"authorization: Bearer sk-secret\r\n" in echo.heads[0]
    printed = capsys.readouterr()
    assert "TTFT of turn 3" in printed.out
    assert "12 in " in printed.out
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["summary"]["succeeded"] == 12
    assert numbers["summary"]["goodput"]["share"] == 1.0
    assert numbers["setting"]["calibrated_by"] == "tokenize"
    folder = tmp_path / "report"
    made = {
        "report.html",
        "report.json",
        "requests.csv",
        "latency.png",
        "timeline.png",
        "load.png",
        "turns.png",
    }
    assert {path.name for path in folder.iterdir()} == made
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page.replace(url, "")  # nothing beside it is loaded
    assert len((folder / "requests.csv").read_text().splitlines()) == 16
    for text in (printed.out, page, (tmp_path / "out.json").read_text()):
        assert "sk-secret" not in text


async def test_the_command_fails_when_nothing_succeeded(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    echo.behave = "busy"
    async with running(echo) as url:
        words = ("--url", url, "--requests", "2", "--rate", "100")
        assert await asyncio.to_thread(bench_command.run, arguments(*words)) == 1
    assert "2 http_503" in capsys.readouterr().out


async def test_the_command_replays_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 10 * n, "input_length": 600, "output_length": 9, "hash_ids": [0, n]}
        for n in range(1, 6)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    echo = Echo()
    async with running(echo) as url:
        words = ("--url", url, "--trace", str(trace), "--token-scale", "0.1", "--max-output-tokens", "3")
        assert await asyncio.to_thread(bench_command.run, arguments(*words)) == 0
    assert len(echo.bodies) == 5
    assert {body["max_tokens"] for body in echo.bodies} == {3}
    texts = [body["messages"][0]["content"].split() for body in echo.bodies]  # type: ignore[index]
    assert len({tuple(text[:50]) for text in texts}) == 1
    assert len({tuple(text) for text in texts}) == 5


@pytest.mark.parametrize(
    "words",
    [
        ("--rate", "1", "--users", "1"),
        ("--users", "0"),
        ("--turns", "0"),
        ("--prompt-tokens", "many"),
        ("--slo-ttft", "-1"),
        ("--body", "[1]"),
        ("--body", "{"),
        ("--header", "no colon"),
        ("--trace", "a", "--turns", "2"),
        ("--processes", "1000"),
        ("--timeout", "nan"),
    ],
)
async def test_options_that_cannot_be_are_refused_in_one_line(words: tuple[str, ...]) -> None:
    async with running(Echo()) as url:
        with pytest.raises(CallerError) as caught:
            await asyncio.to_thread(bench_command.run, arguments("--url", url, *words))
    assert "\n" not in caught.value.message


def test_a_busy_or_starved_client_says_so() -> None:
    quiet = ClientHealth(0.3, 0.5, 0.001, 0.004, 0.001)
    busy = replace(quiet, cpu_peak=0.98)
    starved = replace(quiet, lag_p99_s=0.05)
    said = complaints([quiet, busy, starved])
    assert complaints([quiet]) == ()
    assert len(said) == 2
    assert "--processes" in said[0]
    assert "a core of its own" in said[1]
