"""A start that cannot succeed says why in one line, exits with 1, and leaves nothing."""

import json
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.ray

Serving = Callable[..., AbstractContextManager[Any]]

SIMULATED = {"models": [{"name": "sim", "backend": "simulated", "pools": [{"replicas": 2}]}]}


def write(folder: Path, config: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def vllm(source: str = "embedded", **engine: object) -> object:
    return {"models": [{"name": "m", "source": source, "pools": [{"device": "cpu", "engine": engine}]}]}


def reason_of(served: Any) -> str:
    """The reason of a failed start, after checking that it is one line and that nothing is left."""
    assert served.process.wait(120) == 1
    (reason,) = [line for line in served.lines if line.startswith("headrace: ")]
    assert not any("Traceback" in line for line in served.lines)
    assert served.left_behind() == []
    return reason


def test_a_taken_port_is_named_with_what_to_do(tmp_path: Path, serving: Serving) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with serving(write(tmp_path, SIMULATED), "--port", str(port)) as served:
            reason = reason_of(served)
    assert f"127.0.0.1:{port}" in reason
    assert "--port" in reason


def test_a_model_path_that_does_not_exist_is_named(tmp_path: Path, serving: Serving) -> None:
    with serving(write(tmp_path, vllm("/no/such/model")), "--port", "0") as served:
        assert "no folder /no/such/model; set models[].source" in reason_of(served)


def test_too_little_memory_names_need_and_supply(tmp_path: Path, serving: Serving) -> None:
    with serving(write(tmp_path, vllm(kv_cache_memory_bytes=2**50)), "--port", "0") as served:
        reason = reason_of(served)
    assert "too little memory: 1 replicas need about" in reason
    assert "lower" in reason


def test_gpus_that_are_not_there_are_counted(tmp_path: Path, serving: Serving) -> None:
    config = {
        "models": [{"name": "m", "source": "org/m", "pools": [{"device": "cuda", "tensor_parallel": 64}]}]
    }
    with serving(write(tmp_path, config), "--port", "0") as served:
        assert "the replicas need 64 GPUs" in reason_of(served)


def test_a_cache_that_holds_no_request_is_found_before_anything_starts(
    tmp_path: Path, serving: Serving
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"num_hidden_layers": 30, "num_key_value_heads": 3, "num_attention_heads": 9, "head_dim": 64}
    (model / "config.json").write_text(json.dumps(sizes))
    config = vllm(str(model), kv_cache_memory_bytes=1000, max_model_len=2048)
    with serving(write(tmp_path, config), "--port", "0") as served:
        assert "kv_cache_memory_bytes is 1000; one request of max_model_len 2048 needs" in reason_of(served)
        assert not any("starting Ray" in line for line in served.lines)


@pytest.mark.vllm
def test_what_vllm_refuses_is_told_in_its_own_words(tmp_path: Path, serving: Serving) -> None:
    config = vllm(max_num_batched_tokens=16, max_num_seqs=32, kv_cache_memory_bytes=2**28)
    with serving(write(tmp_path, config), "--port", "0") as served:
        reason = reason_of(served)
        assert "m-unified-0 did not start: vLLM refuses" in reason
        assert "max_num_batched_tokens" in reason
        assert not any("started again" in line and "not started again" not in line for line in served.lines)
        (logs,) = [line for line in served.lines if line.startswith("logs: ")]
        assert Path(logs.removeprefix("logs: ")).is_dir()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts_leaves_nothing(tmp_path: Path, serving: Serving, signum: int) -> None:
    with serving(write(tmp_path, SIMULATED), "--port", "0") as served:
        served.wait_line("starting Ray")
        assert served.end(signum, whole_group=signum == signal.SIGINT) == 0
        assert served.lines[1:] == ["stopping what has started (some seconds)", "stopped"]
        assert served.left_behind() == []
        assert not any("Traceback" in line for line in served.lines)
