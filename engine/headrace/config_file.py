"""A YAML file as data that remembers where each key stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headrace.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""From the root to a value: ``("models", 0, "pools", 1, "replicas")``."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a file says, and the YAML nodes it was read from."""

    path: Path
    value: object
    root: yaml.Node

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Raises `ConfigError` when the file cannot be read or is no YAML, with line and column where known."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
            ) from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                value = None if root is None else loader.construct_document(root)
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
            what = ", ".join(part for part in (error.context, error.problem) if part)
            raise ConfigError(f"{place}: not valid YAML: {what}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
        except ValueError as error:  # a date such as 2024-13-45, which the resolver took for one
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        if root is None:
            raise ConfigError(f"{path}: is empty; it needs at least a key 'models'")
        return cls(path, value, root)

    def position(self, path: KeyPath) -> tuple[int, int]:
        """Line and column, from 1, of a key, or of the innermost thing around it that the file has."""
        mark, node = self.root.start_mark, self.root
        for step in path:
            found = _descend(node, step)
            if found is None:
                break
            node, mark = found
        return mark.line + 1, mark.column + 1


def _descend(node: yaml.Node, step: str | int) -> tuple[yaml.Node, yaml.Mark] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                return value, key.start_mark
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark
    return None


class _Loader(yaml.SafeLoader):
    """YAML without what surprises: a key given twice is an error, where PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} stands twice, first in line {seen[key.value].line + 1}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep)
