"""The Serve application: what `serve run headrace.serve:build_app config=FILE` builds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from headrace import config as configuration
from headrace.config import Config
from headrace.errors import ConfigError
from headrace.fleet import bring_up, preflight
from headrace.serve.ingress import INGRESS, HeadraceIngress

_MAX_ONGOING_REQUESTS = 10_000
"""Of one ingress replica. Serve's default, 5, is meant for models; who waits for one is the gateway's to decide."""

_DRAIN_POLL_S = 0.2
_DRAIN_MARGIN_S = 5.0


def build_app(config: Any) -> Any:
    """A Serve `Application` that serves `config`: a path, a mapping as YAML would give it, or a `Config`.

    `serve run` and `serve deploy` pass a mapping: `config: PATH`, or the configuration's own keys. Raises ConfigError,
    or FatalStartError for what is missing on this machine. What Serve decides about the ingress (replicas,
    autoscaling, health checks) is set as for any deployment, in Serve's own configuration under the name
    `HeadraceIngress`.
    """
    tree = preflight.with_absolute_sources(_read(config))
    bring_up.check_machine(tree, is_local=False)
    deployment = serve.deployment(
        serve.ingress()(HeadraceIngress),
        name=INGRESS,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=tree.fleet.drain_timeout_s + _DRAIN_MARGIN_S,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        # The relay takes a part of a core, at most; a whole one would be taken from an engine on CPU.
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(tree, time.time_ns())


def _read(config: Any) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, str | Path):
        return configuration.load(config)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"build_app takes a path, a mapping or a Config, not {type(config).__name__}; `serve run "
            "headrace.serve:build_app config=FILE` names a file"
        )
    if "config" not in config:
        return configuration.parse(config)
    if unknown := sorted(set(config) - {"config"}):
        raise ConfigError(
            f"unknown argument {unknown[0]!r}; build_app takes `config`, or a configuration's own keys instead"
        )
    return _read(config["config"])
