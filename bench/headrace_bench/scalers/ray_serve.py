"""Ray Serve's autoscaler on ongoing requests.

ray/serve/autoscaling_policy.py (`_core_replica_queue_length_policy`, `_apply_scaling_factors`, `_apply_delay_logic`)
and ray/serve/config.py (`AutoscalingConfig`) of Ray 2.60: what is ongoing, averaged over 30 s, over a target of 2 per
replica; up after 30 s of wanting it without a break, down after 600 s. Ray Serve LLM sets the target to 10^9
(ray/llm/_internal/serve/constants.py), which never scales; users set their own.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import NamedTuple

from headrace_bench.scaling_sample import Bounds, FleetSample

DELAY_SLACK_S = 1e-6


class RayServeSpec(NamedTuple):
    """Fields of AutoscalingConfig."""

    target_ongoing_requests: float = 2.0
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0


DEFAULT = RayServeSpec()


class RayServe:
    """One deployment."""

    def __init__(self, bounds: Bounds, spec: RayServeSpec = DEFAULT) -> None:
        self._bounds = bounds
        self._spec = spec
        self._seen: deque[tuple[float, int]] = deque()
        self._target = 0
        self._sign = 0  # which way it has wanted to go
        self._since_s = 0.0  # and for how long

    def target(self, sample: FleetSample) -> int:
        spec, now_s, seen = self._spec, sample.at_s, self._seen
        if not self._target:
            self._target = sample.current
        seen.append((now_s, sample.concurrency))
        while seen[0][0] <= now_s - spec.look_back_period_s:
            seen.popleft()
        if not sample.ready:
            return self._target
        ongoing = sum(value for _, value in seen) / len(seen)
        desired = self._bounds.clip(self._scaled(ongoing / spec.target_ongoing_requests, sample.ready))
        sign = (desired > self._target) - (desired < self._target)
        if sign == 0:
            self._sign = 0
            return self._target
        if sign != self._sign:
            self._sign, self._since_s = sign, now_s
        delay_s = spec.upscale_delay_s if sign > 0 else spec.downscale_delay_s
        if now_s - self._since_s + DELAY_SLACK_S >= delay_s:
            self._target, self._sign = desired, 0
        return self._target

    def _scaled(self, desired: float, current: int) -> int:
        """_apply_scaling_factors; `current` are the running ones."""
        delta = desired - current
        factor = self._spec.upscaling_factor if delta > 0 else self._spec.downscaling_factor
        scaled = ceil(current + factor * delta - 1e-9)
        if ceil(desired) < current and scaled == current:
            scaled -= 1
        return scaled
