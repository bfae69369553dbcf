"""`headrace simulate`: what it prints and writes, and that it writes the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.cli import main
from headrace.config import SimulatedEngine
from headrace_bench.timing_profile import DEFAULT_ENGINE, ProfileError, TimingProfile, read_profile


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [
        {
            "timestamp": 400 * number,
            "input_length": 2000,
            "output_length": 20,
            "hash_ids": [0, number % 5 + 1, number % 5 + 10, 100 + number],
        }
        for number in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_one_policy_is_printed_in_full_and_equal_options_give_equal_bytes(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for name in ("one.json", "two.json"):
        out = tmp_path / name
        code = main(
            ["simulate", "--trace", str(trace), "--replicas", "2", "--policy", "delay", "--speed", "2",
             "--cache-tokens", "20000", "--seed", "7", "--json", str(out)]
        )  # fmt: skip
        assert code == 0
        outputs.append((capsys.readouterr().out, out.read_bytes()))
    assert outputs[0] == outputs[1]
    screen, data = outputs[0][0], json.loads(outputs[0][1])
    for word in ("TTFT", "ITL", "end-to-end", "hit rate", "goodput", "imbalance", "pooled LRU"):
        assert word in screen
    [policy] = data["policies"]
    assert policy["requests"] == data["scenario"]["requests"] == 40
    assert 0 < policy["hit_rate"] <= data["ceilings"]["infinite"] < 1
    assert data["scenario"]["cache_tokens"] == 20000 // 512 * 512


def test_pools_are_simulated_and_say_how_much_was_handed_over(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["simulate", "--trace", str(trace), "--pools", "1P+1D", "--disaggregation", "threshold"]
    assert main([*command, "--threshold", "10", "--kv-bytes-per-token", "20000"]) == 0
    screen = capsys.readouterr().out
    assert "2 replicas (1P+1D," in screen
    assert "handed over: 100.0% of requests" in screen


def test_a_comparison_prints_a_table_and_writes_a_plot_and_a_page(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    stem = tmp_path / "out" / "policies"
    command = ["simulate", "--trace", str(trace), "--replicas", "3", "--compare", "delay,round_robin"]
    assert main([*command, "--utilisation", "0.5", "--plot", str(stem)]) == 0
    table = capsys.readouterr().out
    assert "delay" in table and "round_robin" in table
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = stem.with_suffix(".html").read_text()
    assert "data:image/png;base64," in page and "round_robin" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--replicas", "0"], "--replicas must be 1..1024"),
        ([], "how many replicas"),
        (["--replicas", "3", "--pools", "1P+1D"], "have 2 replicas"),
        (["--replicas", "2", "--bandwidth", "1e9"], "nobody can hand prompts over"),
        (["--replicas", "2", "--flexible", "--bandwidth", "0"], "--bandwidth must be 1..1e+15"),
        (["--replicas", "2", "--speed", "1", "--utilisation", "0.5"], "choose one"),
        (["--replicas", "2", "--compare", "delay,fastest"], "unknown policy 'fastest'"),
        (["--replicas", "2", "--cache-tokens", "100"], "holds no block"),
        (["--replicas", "2", "--profile", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["simulate", "--trace", str(trace), *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "one.json"
    written = TimingProfile("one", "by hand", DEFAULT_ENGINE)
    written.write(path)
    assert read_profile(path) == written
    path.write_text('{"simulated": {"step_s": 0.5}}')
    assert read_profile(path).engine == SimulatedEngine(step_s=0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must be a JSON object"),
        ("{", "cannot be read"),
        ('{"simulated": {"step_ms": 5}}', "step_ms"),
        ('{"simulated": {"step_s": -1}}', "simulated.step_s"),
    ],
)
def test_a_profile_that_cannot_be_names_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=said):
        read_profile(path)


def test_a_scaled_fleet_is_printed_and_equal_options_give_equal_bytes(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for name in ("one.json", "two.json"):
        out = tmp_path / name
        command = ["simulate", "--trace", str(trace), "--autoscale", "1:4", "--cold-start", "5"]
        assert main([*command, "--scaler", "all", "--seed", "3", "--json", str(out)]) == 0
        outputs.append((capsys.readouterr().out, out.read_bytes()))
    assert outputs[0] == outputs[1]
    screen, data = outputs[0][0], json.loads(outputs[0][1])
    assert "GPU hours" in screen and "ray-serve" in screen
    assert [one["scaler"].split()[0] for one in data["scalers"]][:2] == ["headrace", "fixed"]
    assert all(one["requests"] == 40 for one in data["scalers"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--autoscale", "4"], "MIN:MAX"),
        (["--autoscale", "4:2"], "1 <= min <= max"),
        (["--autoscale", "1:4", "--scaler", "keda"], "unknown scaler 'keda'"),
        (["--autoscale", "1:4", "--cold-start", "-1"], "--cold-start must be"),
        (["--autoscale", "1:4", "--compare", "all"], "goes with --scaler"),
        (["--replicas", "2", "--scaler", "kpa"], "add --autoscale"),
    ],
)
def test_options_of_scaling_that_cannot_be_are_told(
    trace: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", str(trace), *options]) != 0
    assert said in capsys.readouterr().err
