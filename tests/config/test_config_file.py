"""Files: what is wrong, and in which line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.config import load
from headrace.errors import ConfigError


def said_of(folder: Path, text: str | bytes) -> str:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value).replace(f"{path}:", "")


def test_a_problem_stands_where_its_key_stands(tmp_path: Path) -> None:
    text = "models:\n  - name: m\n    pools:\n      - {replicas: -1}\ngateway:\n  polcy: random\n"
    assert said_of(tmp_path, text).splitlines() == [
        "4:10: models[0].pools[0].replicas is -1; it must be at least 0",
        "6:3: unknown key 'polcy' in gateway; did you mean 'policy'?",
    ]


def test_a_contradiction_stands_in_the_file_too(tmp_path: Path) -> None:
    said = said_of(tmp_path, "models:\n  - name: m\n    backend: external\n")
    assert said.startswith("2:5: models[0].urls is empty")


def test_what_is_missing_stands_where_it_should_be(tmp_path: Path) -> None:
    assert said_of(tmp_path, "models:\n  - backend: vllm\n") == "2:5: models[0].name is missing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [\n", "not valid YAML: while parsing a flow node"),
        ("models:\n\t- a\n", "2:1: not valid YAML"),
        ("a: 1\na: 2\n", "2:1: not valid YAML: key 'a' stands twice, first in line 1"),
        ("a: !!python/object:os.system {}\n", "1:4: not valid YAML: could not determine a constructor"),
        ("a: *nothing\n", "1:4: not valid YAML: found undefined alias"),
        ("a: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("a: \x07\n", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("", "is empty; it needs at least a key 'models'"),
        ("# only a comment\n", "is empty"),
        ("a: 1\n---\nb: 1\n", "expected a single document"),
        ("just words\n", "1:1: the configuration is 'just words'; it must be a mapping of keys to values"),
        ("models: &a [*a]\n", "models[0] is [[...]]; it must be a mapping"),
        (b"models: \xff\n", "not UTF-8 text: byte 8 is 0xff"),
    ],
)
def test_what_is_no_configuration_is_told_in_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    answer = said_of(tmp_path, text)
    assert said in answer
    assert "\n" not in answer


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "models:\n  - &base {name: a, backend: simulated}\n  - <<: *base\n    name: b\n", encoding="utf-8"
    )
    assert [model.name for model in load(path).models] == ["a", "b"]


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
