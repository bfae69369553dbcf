"""Headrace inside Ray Serve.

    build_app                 a Serve application: the gateway as ingress, the engines as Ray actors of our own
    DelayAwareRequestRouter   our policy for Ray Serve LLM applications that exist already

Needs `ray[serve]` (extra `serve`).
"""

from __future__ import annotations

try:
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError(f"Ray Serve is not installed ({error}); `pip install headrace[serve]`") from error

from headrace.serve.application import build_app
from headrace.serve.request_router import DelayAwareRequestRouter

__all__ = ["DelayAwareRequestRouter", "build_app"]
