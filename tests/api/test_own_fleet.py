"""Fleets that a Python program brings up: as in a script, as in a notebook, and how they end."""

import os
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from headrace.fleet import warden

pytestmark = pytest.mark.ray

PREAMBLE = """
import asyncio, os, sys
from headrace import Fleet
CONFIG = {"models": [{"name": "sim", "backend": "simulated", "simulated": {"step_s": 0.01},
                      "pools": [{"replicas": 2}]}]}
def say(*words):
    print(*words, flush=True)
"""


class Program:
    """A Python program of its own process group. Its lines come one by one; nothing of it may be left at the end."""

    def __init__(self, text: str) -> None:
        name, value = "HEADRACE_TEST_RUN", secrets.token_hex(8)
        self.mark = f"{name}={value}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(text)],
            env={**os.environ, name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def interrupt(self) -> None:
        """As a terminal's Ctrl-C and Jupyter's: to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[list[str], str]:
        """The rest of its lines and what it said of errors, once it has ended and nothing of it is left."""
        out, err = self.process.communicate(timeout=200)
        assert warden.marked(self.mark) == [], "something was left behind"
        return out.splitlines(), err


@contextmanager
def running(text: str) -> Iterator[Program]:
    program = Program(text)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.process.kill()
        warden.end_all(program.mark, grace_s=5)


def test_a_program_brings_up_a_fleet_twice_and_keeps_its_own_output() -> None:
    program = """
    for round in range(2):
        with Fleet.from_config(CONFIG) as fleet:
            say(len(fleet.chat("Hello", max_tokens=4).text) > 0)
            say(len(list(fleet.stream_chat("Hello", max_tokens=4))) > 1)
            status = fleet.status()
            say(status.num_ready, [replica.state.value for replica in status.replicas])
        say("HEADRACE_RUN" in os.environ)
    """
    with running(program) as run:
        lines, err = run.end()
    assert lines == ["True", "True", "2 ['ready', 'ready']", "False"] * 2, err
    assert err == ""


def test_it_works_where_an_event_loop_runs_in_the_callers_thread_as_in_a_notebook() -> None:
    program = """
    async def notebook():
        fleet = Fleet.from_config(CONFIG).start()       # one cell
        say(len(fleet.chat("Hello", max_tokens=4).text) > 0)
        say(len((await fleet.achat("Hello", max_tokens=4)).text) > 0)
        fleet.close()
        async with Fleet.from_config(CONFIG) as fleet:  # another, the asynchronous way
            stream = fleet.astream_chat("Hello", max_tokens=4)
            say("".join([text async for text in stream]) == stream.answer.text)
            say((await fleet.astatus()).num_ready)
    asyncio.run(notebook())
    """
    with running(program) as run:
        lines, err = run.end()
    assert lines == ["True", "True", "True", "2"], err
    assert err == ""


def test_ctrl_c_in_a_call_leaves_the_fleet_in_order_and_in_its_with_ends_it() -> None:
    program = """
    with Fleet.from_config(CONFIG) as fleet:
        try:
            for text in fleet.stream_chat("Count", max_tokens=20000, ignore_eos=True):
                if text and not globals().get("said"):
                    said = True
                    say("streaming")
        except KeyboardInterrupt:
            say("interrupted")
        say(len(fleet.chat("Still there?", max_tokens=4).text) > 0)
        say("asking")
        fleet.chat("Count", max_tokens=20000, ignore_eos=True)
    """
    with running(program) as run:
        assert run.line() == "streaming"
        run.interrupt()
        assert run.line() == "interrupted"
        assert run.line() == "True"
        assert run.line() == "asking"
        run.interrupt()
        lines, err = run.end()
    assert lines == []
    assert err.rstrip().endswith("KeyboardInterrupt"), err


def test_ctrl_c_while_it_starts_leaves_nothing() -> None:
    program = """
    import logging
    class Say(logging.Handler):
        def emit(self, record):
            say(record.getMessage())
    logging.getLogger("headrace").addHandler(Say())
    logging.getLogger("headrace").setLevel(logging.INFO)
    with Fleet.from_config(CONFIG) as fleet:
        say("not interrupted")
    """
    with running(program) as run:
        assert run.line().startswith("starting Ray")
        run.interrupt()
        lines, err = run.end()
    assert "not interrupted" not in lines
    assert err.rstrip().endswith("KeyboardInterrupt"), err


def test_a_forgotten_fleet_ends_with_the_interpreter() -> None:
    program = """
    fleet = Fleet.from_config(CONFIG).start()
    say(len(fleet.chat("Hello", max_tokens=4).text) > 0)
    del fleet
    """
    with running(program) as run:
        lines, err = run.end()
    assert lines == ["True"], err
    assert err == ""


def test_sigterm_ends_the_program_as_it_would_without_a_fleet() -> None:
    program = """
    fleet = Fleet.from_config(CONFIG).start()
    say("ready")
    fleet.chat("Count", max_tokens=20000, ignore_eos=True)
    """
    with running(program) as run:
        assert run.line() == "ready"
        run.process.terminate()
        run.process.communicate(timeout=200)
        assert run.process.returncode == -signal.SIGTERM
        assert warden.end_all(run.mark, grace_s=15) == 0, "Ray and the replicas end when their program has"


def test_a_fleet_joins_the_ray_of_its_program_and_leaves_it_running() -> None:
    program = """
    import ray
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with Fleet.from_config(CONFIG) as fleet:
        say(len(fleet.chat("Hello", max_tokens=4).text) > 0)
    say(ray.get(ray.remote(lambda: "still here").remote()))
    say([actor for actor in ray.util.list_named_actors(all_namespaces=True)])
    ray.shutdown()
    """
    with running(program) as run:
        lines, err = run.end()
    assert lines == ["True", "still here", "[]"], err


def test_a_pool_is_scaled_and_what_cannot_be_is_an_error_of_ours() -> None:
    program = """
    import time
    from headrace.errors import BadRequest, NotFound
    with Fleet.from_config(CONFIG) as fleet:
        for pool, count in (("nobody", 1), ("sim", -1)):
            try:
                fleet.scale(pool, count)
            except (NotFound, BadRequest) as error:
                say(type(error).__name__)
        say(fleet.scale("sim", 1).pin)
        while len(fleet.status().replicas) > 1:
            time.sleep(0.1)
        say(len(fleet.chat("Hello", max_tokens=4).text) > 0, fleet.status().num_ready)
    """
    with running(program) as run:
        lines, err = run.end()
    assert lines == ["NotFound", "BadRequest", "1", "True 1"], err
    assert err == ""


def test_a_running_fleet_is_found_by_its_name() -> None:
    finder = """
    with Fleet.connect("headrace") as fleet:
        say(len(fleet.chat("Hello", max_tokens=4).text) > 0, fleet.status().num_ready)
    """
    program = f"""
    import subprocess
    with Fleet.from_config(CONFIG) as fleet:
        print(subprocess.run([sys.executable, "-c", {PREAMBLE + textwrap.dedent(finder)!r}],
                             capture_output=True, text=True))
        say(len(fleet.chat("Still there?", max_tokens=4).text) > 0)
    """
    with running(program) as run:
        lines, err = run.end()
    assert "stdout='True 2\\n'" in lines[0] and "stderr=''" in lines[0], lines
    assert lines[1:] == ["True"], err


def test_a_start_that_fails_says_why_in_one_line_and_leaves_nothing() -> None:
    program = """
    from headrace.errors import FatalStartError
    try:
        Fleet.from_config({"models": [{"name": "none", "source": "/no/such/folder"}]}).start()
    except FatalStartError as error:
        say(error)
    """
    with running(program) as run:
        lines, err = run.end()
    assert len(lines) == 1 and "no folder /no/such/folder" in lines[0], err
    assert err == ""


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys, headrace; print([m for m in sys.modules if m.startswith(('headrace', 'ray', 'uvloop'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['headrace']\n"
