"""Several gateway processes on one port: they serve as one, die one by one, and end together."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import Response, request_bytes
from disaggregated import ENGINE, MODEL, TOKEN, Told
from disaggregated import Fleet as Replicas

from headrace.config import Gateway
from headrace.errors import FatalStartError
from headrace.gateway.group import GatewayGroup
from headrace.gateway.listening import bind
from headrace.gateway.settings import GatewaySettings
from headrace_router.types import Role

PATH = "/v1/completions"


class Front:
    """A group before two simulated replicas."""

    def __init__(self, group: GatewayGroup, replicas: Replicas, port: int) -> None:
        self.group = group
        self.replicas = replicas
        self.port = port

    async def send(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    async def whole(self, data: bytes) -> Response:
        reader, writer = await self.send(data)
        try:
            return Response(await reader.read())
        finally:
            writer.close()

    async def ask(self, **fields: Any) -> Response:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2, **fields}
        return await self.whole(request_bytes(body, PATH))

    async def get(self, path: str) -> bytes:
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        return (await self.whole(head.encode())).body

    async def stream(self, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream whose first event has come."""
        body = {"model": MODEL, "prompt": "x", "ignore_eos": True, "stream": True, **fields}
        reader, writer = await self.send(request_bytes(body, PATH))
        await reader.readuntil(b"data: ")
        return reader, writer

    async def counted(self) -> int:
        """Requests ended, as any of the processes tells."""
        text = (await self.get("/metrics")).decode()
        found = re.findall(r'^headrace_requests_total\{error="",model="m",status="200"\} (\S+)$', text, re.M)
        return int(float(found[0])) if found else 0

    async def all_serving(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.group.process_ids) < count:
                await asyncio.sleep(0.01)

    async def kill_one(self) -> None:
        """Returns once the group knows of it, and its successor serves."""
        victim, count = self.group.process_ids[0], len(self.group.process_ids)
        os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(60):
            while victim in self.group.process_ids:
                await asyncio.sleep(0.01)
        await self.all_serving(count)


@asynccontextmanager
async def open_group(
    processes: int = 2, engine: dict[str, Any] | None = None, settings: Told | None = None
) -> AsyncIterator[Front]:
    replicas = Replicas()
    for name in ("u0", "u1"):
        await replicas.add(name, Role.UNIFIED, {**ENGINE, **(engine or {})})
    config = Gateway(port=0, access_log=False, policy="least_loaded", processes=processes)
    group = GatewayGroup(GatewaySettings(0, config, 5.0), replicas, internal_token=TOKEN, changes=settings)
    _, port = group.bind()
    await group.start()
    try:
        yield Front(group, replicas, port)
    finally:
        await group.stop()
        for backend in replicas.backends.values():
            await backend.stop()


async def test_they_serve_as_one_and_any_of_them_speaks_for_all() -> None:
    async with open_group(3) as front:
        assert len(set(front.group.process_ids)) == 3
        answers = await asyncio.gather(*(front.ask() for _ in range(30)))
        assert [answer.status for answer in answers] == [200] * 30
        assert [await front.counted() for _ in range(5)] == [30] * 5
        for _ in range(5):
            told = json.loads(await front.get("/headrace/decisions?last=100"))["decisions"]
            assert len(told) == 30
            assert [entry["time"] for entry in told] == sorted((e["time"] for e in told), reverse=True)
        assert json.loads(await front.get("/ready"))["ready"]


async def test_all_of_them_take_new_settings_and_so_do_successors() -> None:
    told = Told()
    async with open_group(2, settings=told) as front:
        assert (await front.ask(prompt="x" * 4000)).status == 200
        limits = {"limits": {"body_bytes": 1024}}
        told.tell(Gateway.model_validate({"port": 0, "access_log": False, **limits}), 1)

        async def all_refuse() -> None:
            refused = 0
            async with asyncio.timeout(30):
                while refused < 20:
                    refused = refused + 1 if (await front.ask(prompt="x" * 4000)).status == 413 else 0

        await all_refuse()
        await front.kill_one()
        await all_refuse()


async def test_one_that_dies_is_replaced_and_costs_the_others_streams_nothing() -> None:
    async with open_group(2, {"step_s": 0.01}) as front:
        streams = [await front.stream(max_tokens=200) for _ in range(12)]
        before = set(front.group.process_ids)
        victim = front.group.process_ids[0]
        os.kill(victim, signal.SIGKILL)
        ends = []
        for reader, writer in streams:
            try:
                ends.append((await reader.read()).endswith(b"0\r\n\r\n"))
            except ConnectionError:
                ends.append(False)
            writer.close()
        await front.all_serving(2)
        assert any(ends), "the survivor's streams ended well"
        assert victim not in front.group.process_ids
        assert len(before & set(front.group.process_ids)) == 1
        assert await front.counted() >= sum(ends)
        assert (await front.ask()).status == 200


async def test_what_a_dead_process_counted_stays_counted() -> None:
    async with open_group(2) as front:
        for _ in range(12):
            assert (await front.ask()).status == 200
        assert await front.counted() == 12
        for number in range(2):  # whichever has counted
            await front.kill_one()
            assert await front.counted() == 12, number


async def test_the_drain_lets_running_answers_finish_and_takes_nothing_new() -> None:
    async with open_group(2, {"step_s": 0.01}) as front:
        streams = [await front.stream(max_tokens=60) for _ in range(6)]
        pids = [os.pidfd_open(pid) for pid in front.group.process_ids]
        stopping = asyncio.create_task(front.group.stop(30))
        for reader, writer in streams:
            assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            writer.close()
        await stopping
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                signal.pidfd_send_signal(pid, 0)
            os.close(pid)
        with pytest.raises(OSError):
            await front.ask()


async def test_a_second_stop_cuts_the_drain() -> None:
    async with open_group(2, {"step_s": 0.01}) as front:
        reader, writer = await front.stream(max_tokens=4000)
        draining = asyncio.create_task(front.group.stop(300))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await front.group.stop(0)
            await draining
        assert not (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()


async def test_a_port_that_somebody_serves_on_is_refused_also_where_he_shares_it() -> None:
    async with open_group(2) as front:
        config = Gateway(port=front.port, processes=2)
        with pytest.raises(FatalStartError, match=f"cannot listen on 127.0.0.1:{front.port}"):
            GatewayGroup(GatewaySettings(0, config), front.replicas).bind()


def test_ports_are_shared_only_on_purpose() -> None:
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    first.listen()
    with pytest.raises(FatalStartError):
        bind("127.0.0.1", port, shared=True)
    first.close()
    with bind("127.0.0.1", 0, shared=True) as one:
        bind("127.0.0.1", one.getsockname()[1], shared=True).close()


PROGRAM = """
import asyncio
from headrace.config import Gateway
from headrace.gateway.group import GatewayGroup
from headrace.gateway.settings import GatewaySettings
from headrace.gateway.static_fleet import StaticFleet

async def main():
    settings = GatewaySettings(0, Gateway(port=0, policy="round_robin", processes=2))
    group = GatewayGroup(settings, StaticFleet(["http://127.0.0.1:9"]))
    group.bind()
    await group.start()
    print(*group.process_ids, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_none_of_them_outlives_a_killed_supervisor() -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert program.stdout is not None
    pids = [os.pidfd_open(int(pid)) for pid in (await program.stdout.readline()).split()]
    assert len(pids) == 2
    program.kill()
    await program.wait()
    loop = asyncio.get_running_loop()
    for pid in pids:
        ended = asyncio.Event()
        loop.add_reader(pid, ended.set)
        async with asyncio.timeout(30):
            await ended.wait()
        loop.remove_reader(pid)
        os.close(pid)
