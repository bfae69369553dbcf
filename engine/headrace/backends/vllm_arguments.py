"""A replica's settings as vLLM's own command line, so that vLLM's parser checks every value.

Pure but for `parse`, which imports vLLM (seconds).
"""

from __future__ import annotations

import difflib
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from headrace.backends import kv_release
from headrace.backends.kv_connectors import transfer_config
from headrace.backends.owned_arguments import OWNED
from headrace.errors import FatalStartError


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One vLLM engine. `arguments` are vLLM's engine arguments by their Python names."""

    model: str  # served name
    path: str  # folder or Hugging Face id
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    executor: str | None = None  # "mp", "ray", None: vLLM's choice
    kv_connector: str | None = None  # vLLM's name of it
    kv_options: Mapping[str, Any] = field(default_factory=dict)  # the rest of vLLM's kv_transfer_config
    host_cache_gib: float | None = None  # host memory for evicted KV blocks
    sleep_level: int | None = None  # of vLLM's sleep mode, 1 or 2; None: it never sleeps
    kv_event_ports: tuple[int, int] | None = None  # of events and of their replay; None: any that are free

    @property
    def has_kv_events(self) -> bool:
        """Without prefix caching there is nothing to tell a router."""
        return self.arguments.get("enable_prefix_caching", True) is not False


def command_line(settings: EngineSettings) -> list[str]:
    """The arguments of `vllm serve`. Raises FatalStartError for an argument that is Headrace's own to set."""
    words = ["--model", settings.path, "--served-model-name", settings.model]
    words += ["--tensor-parallel-size", str(settings.tensor_parallel)]
    words += ["--pipeline-parallel-size", str(settings.pipeline_parallel)]
    if settings.executor is not None:
        words += ["--distributed-executor-backend", settings.executor]
    # Statistics reach our own logger and Prometheus either way; this only silences the log lines.
    words += ["--disable-log-stats", "--enable-logging-iteration-details", "--enable-prompt-tokens-details"]
    if settings.has_kv_events:
        endpoints = [f"tcp://*:{port}" for port in settings.kv_event_ports or (0, 0)]
        events = {"enable_kv_cache_events": True, "endpoint": endpoints[0], "replay_endpoint": endpoints[1]}
        # For `tcp://*:0` alone vLLM's event publisher binds the node's own address (VLLM_HOST_IP): `tcp://host:port`
        # connects instead of binding, and `tcp://*:PORT` listens on every interface.
        words += ["--kv-events-config", json.dumps(events)]
    words += _transfer(settings)
    if settings.sleep_level is not None:
        words += ["--enable-sleep-mode"]
    for name, value in settings.arguments.items():
        words += _option(name.replace("-", "_"), value)
    return words


def _transfer(settings: EngineSettings) -> list[str]:
    config = transfer_config(settings.kv_connector, settings.kv_options, settings.host_cache_gib)
    if config is None:
        return []
    words = ["--kv-transfer-config", json.dumps(config)]
    if settings.kv_connector is not None and "worker_extension_cls" not in settings.arguments:
        words += ["--worker-extension-cls", kv_release.QUALIFIED_NAME]
    return words


def _option(name: str, value: Any) -> list[str]:
    if name in OWNED:
        raise FatalStartError(f"engine argument {name!r} cannot be set here; set {OWNED[name]}")
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *(item if isinstance(item, str) else json.dumps(item) for item in value)]
    return [flag, str(value)]


def parse(settings: EngineSettings) -> Namespace:
    """The namespace that vLLM's server functions take. Raises FatalStartError with vLLM's own complaint."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        """Raises where argparse would print its usage and exit."""

        def error(self, message: str) -> NoReturn:
            known = [action.dest for action in self._actions]
            raise FatalStartError(f"pools[].engine of model {settings.model!r}: {explain(message, known)}")

    # Without abbreviations: `max_num_seq` is a typo, whatever it would be short for.
    namespace: Namespace = make_arg_parser(Parser(allow_abbrev=False)).parse_args(command_line(settings))
    if stray := getattr(namespace, "model_tag", None):  # vLLM's one argument without a name
        raise FatalStartError(
            f"pools[].engine of model {settings.model!r}: {stray!r} is one value too many; flags take true or "
            "false, the others one value"
        )
    return namespace


def explain(message: str, known: list[str]) -> str:
    """argparse's complaint in one line, in the user's terms: Python names, and the nearest one for a typo."""
    unknown = re.match(r"unrecognized arguments: --(?:no-)?([a-z0-9-]+)", message)
    if unknown is None:
        return _told(" ".join(message.split()))
    name = unknown[1].replace("-", "_")
    near = difflib.get_close_matches(name, known, n=1)
    return f"vLLM has no engine argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _told(message: str) -> str:
    """`argument --max-model-len: invalid ... value: 'lots'` in the words of the configuration."""
    found = re.match(r"argument --([a-z0-9-]+): (?:invalid (\w+) value|invalid choice): (.+)", message)
    if found is None:
        return message
    name, kind, value = found[1].replace("-", "_"), found[2], found[3]
    if kind is None:
        given, _, choices = value.removesuffix(")").partition(" (choose from ")
        return f"{name} is {given}; it must be one of {choices}"
    form = (
        "a whole number, or one such as 32k" if kind.startswith("human_readable_int") else f"of kind {kind}"
    )
    return f"{name} is {value}; it must be {form}" + (", or auto" if kind.endswith("_or_auto") else "")
