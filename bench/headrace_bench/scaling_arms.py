"""The scalers that are compared: each with its defaults, then a sweep of what its users would tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from headrace.errors import CallerError
from headrace.fleet.scaling_spec import ScalingSpec
from headrace_bench.scalers.dynamo import LoadPlanner, LoadPlannerSpec, LoadScaling, LoadScalingSpec
from headrace_bench.scalers.fixed import Fixed
from headrace_bench.scalers.hpa import Hpa, Metric, concurrency, queue_length
from headrace_bench.scalers.kpa import Kpa, KpaSpec
from headrace_bench.scalers.ours import Ours
from headrace_bench.scalers.ray_serve import RayServe, RayServeSpec
from headrace_bench.scalers.wva import Wva, WvaSpec
from headrace_bench.scaling_sample import Bounds, Scaler

OURS = "headrace"


@dataclass(frozen=True, slots=True)
class Arm:
    """One scaler with its settings."""

    family: str
    setting: str  # "" are its defaults
    make: Callable[[Bounds], Scaler]
    initial: int | None = None  # replicas at the start; None: as the study says

    @property
    def name(self) -> str:
        return f"{self.family} {self.setting}".strip()

    @property
    def source(self) -> str:
        """The module that decides."""
        return f"headrace_bench.scalers.{SOURCES[self.family]}"


SOURCES = {
    OURS: "ours", "fixed": "fixed", "hpa-queue": "hpa", "hpa-concurrency": "hpa", "kpa": "kpa", "llm-d-wva": "wva",
    "ray-serve": "ray_serve", "dynamo-planner": "dynamo", "dynamo-load": "dynamo",
}  # fmt: skip


FIXED = (12, 16, 18, 20, 21, 22, 23, 25, 28, 32)
HEADROOMS = (0.0, 2.0)


def study_arms() -> list[Arm]:
    """Ours first; of each family its defaults first."""

    def made(family: str, scaler: Callable[[Bounds, Any], Scaler], specs: dict[str, object]) -> list[Arm]:
        return [Arm(family, name, partial(_made, scaler=scaler, spec=spec)) for name, spec in specs.items()]

    return [
        Arm(OURS, "", _ours),
        *(Arm(OURS, f"headroom {headroom:g}", partial(_ours, headroom=headroom)) for headroom in HEADROOMS),
        *(Arm("fixed", str(num), partial(_fixed, replicas=num), num) for num in FIXED),
        Arm("hpa-queue", "1", partial(_hpa, metric=queue_length, target=1.0)),
        *(
            Arm("hpa-concurrency", f"{target:g}", partial(_hpa, metric=concurrency, target=target))
            for target in (8.0, 4.0, 6.0)
        ),
        *made(
            "kpa",
            _kpa,
            {
                "": KpaSpec(),
                "target 8": KpaSpec(8.0),
                "target 6, delay 120 s": KpaSpec(6.0, down_delay_s=120.0),
                "target 8, delay 300 s": KpaSpec(8.0, down_delay_s=300.0),
            },
        ),
        *made(
            "llm-d-wva",
            Wva,
            {
                "": WvaSpec(),
                "spare 0.5 and 4.5, 15 s": WvaSpec(kv_spare=0.5, queue_spare=4.5, interval_s=15.0),
            },
        ),
        *made(
            "ray-serve",
            RayServe,
            {
                "": RayServeSpec(),
                "target 6": RayServeSpec(6.0),
                "target 5, up 10 s, down 120 s": RayServeSpec(
                    5.0, upscale_delay_s=10.0, downscale_delay_s=120.0
                ),
            },
        ),
        *made(
            "dynamo-planner",
            LoadPlanner,
            {"": LoadPlannerSpec(), "0.3 and 0.15, 10 s": LoadPlannerSpec(0.3, 0.15, 10.0)},
        ),
        *made("dynamo-load", LoadScaling, {"": LoadScalingSpec(), "latency": LoadScalingSpec(0.4, 0.1)}),
    ]


def scaler_names() -> list[str]:
    """Families, ours first."""
    return list(dict.fromkeys(arm.family for arm in study_arms()))


def named_arms(names: str, initial: int) -> list[Arm]:
    """Families by name, comma-separated, or `all`; each with its defaults, fixed with `initial` replicas. Raises
    `CallerError` on an unknown one."""
    known = scaler_names()
    wanted = known if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise CallerError(f"unknown scaler {name!r}; there are {', '.join(known)}")
    if not wanted:
        raise CallerError(f"--scaler names none; there are {', '.join(known)}")
    defaults = {arm.family: arm for arm in reversed(study_arms())}
    defaults["fixed"] = Arm("fixed", str(initial), partial(_fixed, replicas=initial), initial)
    return [defaults[name] for name in dict.fromkeys(wanted)]


def _ours(bounds: Bounds, **changes: float) -> Scaler:
    return Ours(ScalingSpec(bounds.min_replicas, bounds.max_replicas, **changes))  # type: ignore[arg-type]


def _fixed(bounds: Bounds, replicas: int) -> Scaler:
    return Fixed(bounds.clip(replicas))


def _hpa(bounds: Bounds, metric: Metric, target: float) -> Scaler:
    return Hpa(metric, target, bounds)


def _made(bounds: Bounds, scaler: Callable[[Bounds, Any], Scaler], spec: object) -> Scaler:
    return scaler(bounds, spec)


def _kpa(bounds: Bounds, spec: KpaSpec) -> Scaler:
    return Kpa(spec)  # remembers no count of its own: whoever follows it keeps to the bounds
