"""The gateways that are measured: ours, and its peers where they are installed.

    python -m headrace_bench.peers install    puts the Python peers into virtual environments under `.peers/`
    python -m headrace_bench.peers            lists what is there

A peer is never a dependency of ours. HAProxy comes from the system's packages (`apt-get install haproxy`).
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which

import msgspec

from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Role

REPOSITORY = Path(__file__).resolve().parents[2]
PEERS = REPOSITORY / ".peers"
RUST_ROUTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    # name: (pinned distribution, installed without its own dependencies; what its launcher really imports)
    "vllm-router": (
        "vllm-router==0.1.17",
        ("setproctitle", "aiohttp", "orjson", "uvicorn", "fastapi", "requests"),
    ),
    "sglang-router": ("sglang-router==0.3.2", ("setproctitle", "aiohttp", "orjson", "uvicorn", "fastapi")),
}
GATEWAYS = ("headrace", "headrace+log", "headrace+tokens", "vllm-router", "sglang-router", "haproxy")
OUR_NAMES = {"cache_aware": "delay"}
"""Our policy that does what a peer's is meant to."""
HAPROXY_BALANCE = {"round_robin": "roundrobin", "least_loaded": "leastconn"}
HAPROXY_CONFIG = """\
global
    nbthread 1
    maxconn 2000
defaults
    mode http
    option http-no-delay
    option http-keep-alive
    http-reuse always
    timeout connect 5s
    timeout client 600s
    timeout server 600s
frontend f
    bind 127.0.0.1:{port}
    default_backend b
backend b
    balance {balance}
{servers}
"""


class PeerMissing(Exception):
    """The gateway is not installed or does not know the policy; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one gateway. `url` is None where the process itself prints `ready: URL`."""

    name: str
    version: str
    command: tuple[str, ...]
    url: str | None


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def launch(name: str, backends: Sequence[str], policy: str, folder: Path) -> Launch:
    """The start of gateway `name` in front of `backends`. May write a configuration into `folder`.

    Raises `PeerMissing` when it is not installed or has no such policy.
    """
    if name in ("headrace", "headrace+log"):
        return _headrace(name, backends, OUR_NAMES.get(policy, policy))
    if name == "headrace+tokens":
        return _headrace_with_tokens(backends, OUR_NAMES.get(policy, policy), folder)
    if name == "haproxy":
        return _haproxy(backends, policy, folder)
    return _rust_router(name, backends, policy)


def _headrace(name: str, backends: Sequence[str], policy: str) -> Launch:
    """Ours without an access log, as the peers run, or with it, as it runs by default."""
    command = [
        sys.executable,
        "-m",
        "headrace.cli",
        "route",
        "--policy",
        policy,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    for backend in backends:
        command += ["--backend", backend]
    if name == "headrace":
        command.append("--no-access-log")
    return Launch(name, own_version(), tuple(command), None)


def _headrace_with_tokens(backends: Sequence[str], policy: str, folder: Path) -> Launch:
    """Ours as before replicas of its own fleet: prompts are read as the embedded model's tokens, in blocks of 32.

    The backends tell nothing of their caches, so what is known of them is what was routed there of late.
    """
    replicas = [
        Replica(
            id=ReplicaId(f"mock-{number}"),
            boot_id=BootId(f"boot-{number}"),
            model="mock",
            role=Role.UNIFIED,
            endpoints=Endpoints(url),
            block_size=32,
            num_blocks=8192,
            max_model_len=1 << 20,
        )
        for number, url in enumerate(backends)
    ]
    path = folder / "replicas.json"
    path.write_bytes(msgspec.json.encode(replicas))
    command = (
        sys.executable, "-m", "headrace_bench.fixed_gateway", "--replicas", str(path), "--policy", policy
    )  # fmt: skip
    return Launch("headrace+tokens", own_version(), command, None)


def own_version() -> str:
    try:
        number = version("headrace")
    except PackageNotFoundError:
        number = "uninstalled"
    commit = subprocess.run(
        ("git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"),
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{number} ({commit.stdout.strip()})" if commit.returncode == 0 else number


def _haproxy(backends: Sequence[str], policy: str, folder: Path) -> Launch:
    binary = which("haproxy") or which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise PeerMissing("haproxy is not installed; Debian: apt-get install haproxy")
    if policy not in HAPROXY_BALANCE:
        raise PeerMissing(f"haproxy has no policy like {policy}")
    port = free_port()
    servers = "\n".join(f"    server s{i} {url.removeprefix('http://')}" for i, url in enumerate(backends))
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY_CONFIG.format(port=port, balance=HAPROXY_BALANCE[policy], servers=servers))
    banner = subprocess.run((binary, "-v"), capture_output=True, text=True, check=True).stdout.split()
    return Launch(
        "haproxy", banner[2].split("-")[0], (binary, "-db", "-f", str(config)), f"http://127.0.0.1:{port}"
    )


def _rust_router(name: str, backends: Sequence[str], policy: str) -> Launch:
    python = PEERS / name / "bin" / "python"
    if name not in RUST_ROUTERS:
        raise PeerMissing(f"no gateway is called {name}; there are {', '.join(GATEWAYS)}")
    if not python.exists():
        raise PeerMissing(f"{name} is not installed; run python -m headrace_bench.peers install")
    port, peer_policy = free_port(), {"least_loaded": "power_of_two"}.get(policy, policy)
    # vllm-router's launcher is a console script, sglang-router's a module.
    program = [str(python), str(PEERS / name / "bin" / name)] if name == "vllm-router" else []
    program = program or [str(python), "-m", "sglang_router.launch_router"]
    command = (
        *program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *backends,
        "--policy", peer_policy, "--worker-startup-check-interval", "1", "--prometheus-port", str(free_port()),
        "--log-level", "warning" if name == "vllm-router" else "warn",
    )  # fmt: skip
    return Launch(name, RUST_ROUTERS[name][0].partition("==")[2], command, f"http://127.0.0.1:{port}")


def install(names: Sequence[str]) -> int:
    """Make the virtual environments that are not there yet. Returns the number that failed."""
    failed = 0
    for name in names:
        distribution, needs = RUST_ROUTERS[name]
        folder, stamp = PEERS / name, PEERS / name / f"installed-{distribution}"
        if stamp.exists():
            print(f"{distribution}: already in {folder.relative_to(REPOSITORY)}")
            continue
        print(f"{distribution}: installing, about half a minute", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check")
        steps = ((*pip, "--no-deps", distribution), (*pip, *needs))
        if all(subprocess.run(step, check=False).returncode == 0 for step in steps):
            stamp.touch()
        else:
            print(f"{distribution}: failed, see above; benchmarks will go on without it", file=sys.stderr)
            failed += 1
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="headrace_bench.peers", description="The peers of the relay benchmark."
    )
    parser.add_argument("action", nargs="?", choices=("list", "install"), default="list")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RUST_ROUTERS)}; all when none is named")
    args = parser.parse_args()
    if args.action == "install":
        unknown = sorted(set(args.names) - set(RUST_ROUTERS))
        if unknown:
            parser.error(f"cannot install {', '.join(unknown)}; can install {', '.join(RUST_ROUTERS)}")
        return install(args.names or tuple(RUST_ROUTERS))
    for name, (distribution, _) in RUST_ROUTERS.items():
        there = (PEERS / name / f"installed-{distribution}").exists()
        print(
            f"{distribution:24} {'installed' if there else 'missing: python -m headrace_bench.peers install'}"
        )
    print(f"{'haproxy':24} {'installed' if which('haproxy') else 'missing: apt-get install haproxy'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
