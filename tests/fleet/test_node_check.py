"""What nodes of a cluster lack, told in a line each."""

import platform
import subprocess
import sys

import cloudpickle

from headrace.fleet.node_check import Installed, _look, faults

HERE = Installed("3.11.7", {"ray": "2.60.0", "headrace": "0.1.0", "vllm": "0.32.0"})


def test_nodes_that_are_like_this_one_have_no_faults() -> None:
    assert faults(HERE, [("10.0.0.2", HERE), ("10.0.0.3", HERE)]) == []


def test_each_fault_is_a_line_with_what_to_do() -> None:
    node = Installed("3.12.1", {"ray": "2.59.0", "headrace": "0.1.0", "vllm": None}, ("/models/m",))
    assert faults(HERE, [("10.0.0.2", node)]) == [
        "node 10.0.0.2 has Python 3.12.1, here it is 3.11.7; install one version everywhere",
        "node 10.0.0.2 has ray 2.59.0, here it is 2.60.0; install one version everywhere",
        "node 10.0.0.2 has no vllm; install the version that is here, 0.32.0",
        "node 10.0.0.2 has no folder /models/m; put the model there under the same path, or choose nodes by "
        "pools[].node_labels",
    ]


def test_only_what_is_needed_counts() -> None:
    node = Installed("3.11.7", {"ray": "2.60.0", "headrace": "0.1.0", "vllm": None})
    assert faults(HERE, [("10.0.0.2", node)], ["ray", "headrace"]) == []


def test_the_question_needs_nothing_of_ours_to_be_asked() -> None:
    """It travels by value: where headrace is not installed it is answered all the same."""
    program = (
        "import pickle, sys; sys.modules['headrace'] = None;"
        "look = pickle.loads(sys.stdin.buffer.read()); print(look(['no-such'], ['/no/such']))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], input=cloudpickle.dumps(_look()), capture_output=True, check=True
    )
    assert answer.stdout.decode().strip() == str(
        (platform.python_version(), {"no-such": None}, ("/no/such",))
    )
