"""What a command says when it cannot reach the fleet that is meant."""

import socket
import subprocess
import sys

import pytest


@pytest.mark.ray
def test_a_command_whose_join_outlasts_its_patience_prints_no_traceback() -> None:
    with socket.socket() as silent:  # bound, and nobody listens
        silent.bind(("127.0.0.1", 0))
        program = (
            "import sys\n"
            "from headrace.fleet import controller_call\n"
            "controller_call.JOIN_TIMEOUT_S = 0.01\n"  # Ray is still importing then
            "from headrace.cli import main\n"
            f"sys.exit(main(['status', '--address', '127.0.0.1:{silent.getsockname()[1]}']))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("headrace: the Ray cluster at 127.0.0.1:")
