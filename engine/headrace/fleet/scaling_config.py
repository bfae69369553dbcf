"""The configuration of autoscaling in the autoscaler's words. Pure."""

from __future__ import annotations

import datetime
import zoneinfo

from headrace.config_autoscale import Autoscale, Hint
from headrace.fleet.scaling_spec import ScalingSpec, ScheduleHint

_DAY_S = 86_400.0


def scaling_spec(scale: Autoscale, clock_s: float, wall_s: float) -> ScalingSpec:
    """`clock_s` is now on the clock of the samples, `wall_s` now in Unix time. The schedule's times of day are moved
    onto the first: that clock never jumps, where that of a time zone does, twice a year."""
    zone = zoneinfo.ZoneInfo(scale.time_zone)
    local = datetime.datetime.fromtimestamp(wall_s, zone)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0)
    shift_s = clock_s - (local.replace(tzinfo=None) - midnight.replace(tzinfo=None)).total_seconds()
    return ScalingSpec(
        min_replicas=scale.min_replicas,
        max_replicas=scale.max_replicas,
        target_waiting=scale.target_waiting,
        target_kv=scale.target_kv,
        target_wait_s=scale.target_wait_s,
        headroom=scale.headroom,
        tolerance=scale.tolerance,
        stabilisation_s=scale.stabilisation_s,
        max_step_up=scale.max_step_up,
        max_step_down=scale.max_step_down,
        idle_s=scale.idle_s,
        schedule=tuple(_hint(hint, shift_s) for hint in scale.schedule),
    )


def _hint(hint: Hint, shift_s: float) -> ScheduleHint:
    from_s, until_s = _of_day(hint.from_), _of_day(hint.until)
    if until_s - from_s == _DAY_S:
        return ScheduleHint(0.0, _DAY_S, hint.min_replicas)
    return ScheduleHint((from_s + shift_s) % _DAY_S, (until_s + shift_s) % _DAY_S, hint.min_replicas)


def _of_day(time: str) -> float:
    hours, _, minutes = time.partition(":")
    return int(hours) * 3600.0 + int(minutes) * 60.0
