"""The `headrace` command: its help, its errors, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli import COMMANDS, CommandMissing, _import, commands, main
from headrace.fleet import run_file

CONFIGS = Path(__file__).parents[1] / "configs"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in COMMANDS)


def test_commands_of_the_bench_join() -> None:
    assert commands()["bench"].module == "headrace_bench.bench_command"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: headrace {name}")


@pytest.mark.parametrize("words", [[], ["nonsense"], ["config"], ["config", "check"], ["--port"]])
def test_wrong_usage_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: headrace" in capsys.readouterr().err


def test_a_good_configuration_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(CONFIGS / "simulated.yaml")]) == 0
    assert "simulated.yaml: ok\n  model simulated: simulated; 16 unified on cpu" in capsys.readouterr().out


@pytest.mark.vllm
def test_engine_arguments_are_put_before_vllm_and_wrong_ones_have_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "models:\n  - name: m\n    pools:\n      - engine:\n          blok_size: 16\n          block_size: 32\n"
    )
    assert main(["config", "check", str(path)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"{path}: asking vLLM")
    assert told[1:] == [
        f"headrace: {path}:5:11: models[0].pools[0].engine: vLLM has no engine argument 'blok_size'; "
        "did you mean 'block_size'?"
    ]
    assert main(["config", "check", str(CONFIGS / "local.yaml")]) == 0
    assert "local.yaml: ok\n  model smollm2: vLLM, embedded" in capsys.readouterr().out


def test_explain_asks_the_fleet_that_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    own = run_file.Run(os.getpid(), run_file.began(os.getpid()), "f", "http://127.0.0.1:1", "ray:1", None)
    with run_file.announced(own):
        assert main(["explain"]) == 1
    assert "no gateway answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_a_bad_configuration_ends_with_1_and_a_line_for_each_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("gateway: {port: -1}\nmodel: []\n", encoding="utf-8")
    assert main(["config", "check", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"headrace: {path}:") for line in lines)


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Headrace configuration"


def test_a_command_that_is_not_installed_says_so() -> None:
    with pytest.raises(CommandMissing, match="the command 'x' is not part of this installation"):
        _import("x", "headrace.no_such_command")


@pytest.mark.parametrize(
    "words", [["--help"], ["route", "--help"], ["config", "schema"], ["serve", "--help"]]
)
def test_neither_ray_nor_vllm_nor_torch_is_imported_to_be_asked(words: list[str]) -> None:
    program = (
        "import sys\nfrom headrace.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(', '.join({'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
