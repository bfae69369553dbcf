"""A Ray cluster with a node on each host of a network of namespaces, and whoever asks it how it is."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import network
from network import Host

from headrace.fleet import warden

_MARK = "HEADRACE_TEST_CLUSTER"
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's least is 75 MiB
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_PORT = 6379
_START_TIMEOUT_S = 120.0


class Cluster:
    """Ray's head is on the first host. `start` each host, or all; `end` takes everything away, at any moment."""

    def __init__(self, num_hosts: int = 3, cpus: int = 2) -> None:
        self._network = network.Network(num_hosts)
        self._cpus = cpus
        for name in network.remove_abandoned():
            shutil.rmtree(_folder(name), ignore_errors=True)
        self._folder = _folder(self._network.name)
        self._folder.mkdir(mode=0o700)
        self.hosts = self._network.hosts
        self.head = self.hosts[0]
        self.address = f"{self.head.address}:{_PORT}"
        mark = secrets.token_hex(8)
        # Should the tests be killed, the processes end with them; the namespaces go when tests run again.
        self._warden = warden.post(f"{_MARK}={mark}")
        self.environment: Mapping[str, str] = {
            **os.environ,
            # Without a token the second node is refused.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",  # a busy machine takes longer than the 30 s that Ray waits
            _MARK: mark,
        }
        self._observer: Observer | None = None

    def start(self) -> None:
        """Returns once every node has joined."""
        self._network.make()
        self.start_node(self.head)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start_node, self.hosts[1:]))

    def start_node(self, host: Host) -> None:
        """`ray start` there. A node of that host that has ended is another one from then on."""
        number = self.hosts.index(host) + 1
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        role = head if host is self.head else [f"--address={self.address}"]
        self.run(
            host,
            *_RAY,
            "start",
            *role,
            f"--node-ip-address={host.address}",
            f"--num-cpus={self._cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--temp-dir={self._folder}/{number}",
            "--disable-usage-stats",
        )

    def run(self, host: Host, *command: str, timeout_s: float = _START_TIMEOUT_S) -> str:
        """What a command says on that host. Raises AssertionError with it where it fails."""
        done = subprocess.run(
            [*host.inside, *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C is for the tests alone
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
        return done.stdout

    @property
    def observer(self) -> Observer:
        """Connected from the head's host when it is first asked for."""
        if self._observer is None:
            self._observer = Observer(self)
        return self._observer

    def end(self) -> None:
        if self._observer is not None:
            self._observer.end()
        self._network.remove()
        self._warden.kill()
        self._warden.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _folder(network_name: str) -> Path:
    """Of Ray's files. Short: sockets are in it, whose paths may have 107 characters."""
    return Path("/tmp") / network_name


class Observer:
    """A Ray driver on the head's host, `observer_program.py`. Each question is one line, and so is the answer."""

    def __init__(self, cluster: Cluster) -> None:
        program = str(Path(__file__).with_name("observer_program.py"))
        self._process = subprocess.Popen(
            [*cluster.head.inside, sys.executable, program, cluster.address],
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def nodes(self) -> list[str]:
        """Addresses of the nodes that Ray holds for alive."""
        nodes: list[str] = self._ask("nodes")
        return nodes

    def actors(self) -> list[str]:
        """Names of the detached actors that Ray holds for alive, of every fleet."""
        actors: list[str] = self._ask("actors")
        return actors

    def status(self, fleet: str) -> dict[str, Any]:
        """What the controller says: `replicas`, `gateways` and more. Empty where none answers."""
        status: dict[str, Any] = self._ask("status", fleet)
        return status

    def _ask(self, *words: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the observer has ended"
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
