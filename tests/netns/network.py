"""Hosts that are network namespaces of this machine: a bridge, and a cable from it to each of them.

    tests ── bridge (the subnet's first address) ──┬── host 1 (the second)
                                                   ├── host 2
                                                   └── host 3

A host shares this machine's files and process numbers, and no interface: its loopback is its own, and what it sends to
another crosses the bridge, or does not once its cable is cut.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

_NAME = "hdr"  # of interfaces and namespaces, with the process that made them: hdr4711, hdr4711-1
_LONGEST_END_S = 20.0


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. `link` is the bridge's end of its cable."""

    name: str
    address: str
    link: str

    @property
    def inside(self) -> list[str]:
        """What to put before a command, so that it runs there."""
        return ["ip", "netns", "exec", self.name]

    def pids(self) -> list[int]:
        """Processes that run there."""
        return [int(line) for line in _ip("netns", "pids", self.name).split()]

    def running(self, program: str) -> list[int]:
        """Those of a program: the end of its path, or the beginning of the title that Ray gives its workers."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as line:
                first = line.read().partition("\0")[0]
                if first.startswith(program) or first.endswith(program):
                    found.append(pid)
        return found

    def cut(self) -> None:
        """Nothing reaches it, nothing leaves it; nobody is told."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        _ip("link", "set", self.link, "up")

    def lose_power(self) -> None:
        """Nobody hears its end: not even a connection is reset."""
        self.cut()
        self.kill()

    def kill(self) -> None:
        """Every process of it at once; its kernel resets their connections. Returns when none is left."""
        deadline_s = time.monotonic() + _LONGEST_END_S
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline_s, f"processes of {self.name} cannot be killed: {pids}"
            time.sleep(0.02)


class Network:
    """Hosts on one bridge, numbered from 1. `remove` takes all of it away, at any moment, twice too."""

    def __init__(self, num_hosts: int) -> None:
        self.name = f"{_NAME}{os.getpid()}"  # of the bridge, and of what belongs to it
        self._subnet = _free_subnet()
        self.hosts = [
            Host(f"{self.name}-{number}", str(self._subnet[number + 1]), f"{self.name}-{number}")
            for number in range(1, num_hosts + 1)
        ]

    def make(self) -> None:
        gateway, width = self._subnet[1], self._subnet.prefixlen
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{gateway}/{width}", "dev", self.name)
        _ip("link", "set", self.name, "up")
        for host in self.hosts:
            _ip("netns", "add", host.name)
            cable = ["link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name]
            _ip(*cable)
            _ip("link", "set", host.link, "master", self.name, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/{width}", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", interface, "up")
            # Ray asks the kernel for its own address by a route to the outside: without one a program takes the
            # head's node for its own.
            _ip("-n", host.name, "route", "add", "default", "via", str(gateway))

    def remove(self) -> None:
        """With every process of the hosts."""
        _remove(self.name)


def missing() -> str:
    """Why there can be no such network here, "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (Debian and Ubuntu: apt-get install iproute2)"
    name = f"{_NAME}{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


def _free_subnet() -> ipaddress.IPv4Network:
    """A private one that no route of this machine knows."""
    routes = re.findall(r"^(\d[\d.]+(?:/\d+)?) ", _ip("-4", "route", "show", "table", "all"), re.MULTILINE)
    known = [ipaddress.IPv4Network(route) for route in routes]
    options = list(ipaddress.IPv4Network("10.213.0.0/16").subnets(new_prefix=24))
    first = os.getpid() % len(options)
    return next(one for one in options[first:] + options[:first] if not any(map(one.overlaps, known)))


def remove_abandoned() -> list[str]:
    """What tests left that were killed. Returns the names of these networks."""
    bridges = re.findall(rf"^\d+: ({_NAME}(\d+)): ", _ip("-o", "link", "show"), re.MULTILINE)
    abandoned = [name for name, pid in bridges if not os.path.exists(f"/proc/{pid}")]
    for name in abandoned:
        _remove(name)
    return abandoned


def _remove(bridge: str) -> None:
    names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    for name in names:
        if name.startswith(f"{bridge}-"):
            Host(name, "", name).kill()
            _remove_link(name)  # the namespace would take it along, later
            _ip("netns", "delete", name)
    _remove_link(bridge)


def _remove_link(name: str) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # there is none
        _ip("link", "delete", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, ["ip", *words], done.stdout, done.stderr)
    return done.stdout
