"""Was the load client too slow? A client that lags measures itself, so it watches itself and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

BEAT_S = 0.01
"""The event loop is asked to come back this often; how late it does is its lag."""

WINDOW_S = 0.5
"""CPU use is taken over windows of this length; the busiest one counts."""

LIMIT_CPU = 0.9
LIMIT_LAG_S = 0.010
"""p99 of the loop's lag. A quiet uvloop is within 1 ms (its timers tick in milliseconds)."""

LIMIT_LATE_S = 0.020
"""p99 of how late requests of an open loop were sent."""


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """One client process. `cpu` is of one core: 1.0 is a full one."""

    cpu_mean: float
    cpu_peak: float
    lag_p99_s: float
    lag_max_s: float
    late_p99_s: float = 0.0

    def complaint(self) -> str | None:
        """Why this client's numbers are not to be trusted, and what to do; None when they are."""
        if self.cpu_peak > LIMIT_CPU:
            return f"the client used {self.cpu_peak:.0%} of a core: raise --processes or lower the load"
        late = max(self.lag_p99_s / LIMIT_LAG_S, self.late_p99_s / LIMIT_LATE_S)
        if late > 1:
            return (
                f"the client ran late (event loop p99 {self.lag_p99_s * 1e3:.1f} ms, sending p99 "
                f"{self.late_p99_s * 1e3:.1f} ms) at {self.cpu_mean:.0%} of a core: "
                "other processes take its CPU; give it a core of its own"
            )
        return None


def complaints(clients: Sequence[ClientHealth]) -> tuple[str, ...]:
    """One line per client process that was the bottleneck."""
    return tuple(
        f"client {number} of {len(clients)}: {said}"
        for number, client in enumerate(clients, 1)
        if (said := client.complaint())
    )


class HealthWatch:
    """Watches the running event loop from `start` to `stop`. Mutable, one per process."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._cpu_peak = 0.0
        self._task: asyncio.Task[None] | None = None
        self._began = (0.0, 0.0)

    def start(self) -> None:
        self._began = (time.monotonic(), time.process_time())
        self._task = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        window_s, window_cpu_s = self._began
        while True:
            due_s = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            now_s = time.monotonic()
            self._lags_s.append(max(0.0, now_s - due_s))
            if now_s - window_s >= WINDOW_S:
                cpu_s = time.process_time()
                self._cpu_peak = max(self._cpu_peak, (cpu_s - window_cpu_s) / (now_s - window_s))
                window_s, window_cpu_s = now_s, cpu_s

    def stop(self, late_s: Sequence[float]) -> ClientHealth:
        """End watching. `late_s`: how late each planned request was sent, in seconds."""
        if self._task is not None:
            self._task.cancel()
        wall_s = max(1e-9, time.monotonic() - self._began[0])
        cpu = (time.process_time() - self._began[1]) / wall_s
        return ClientHealth(
            cpu_mean=cpu,
            cpu_peak=max(cpu, self._cpu_peak),
            lag_p99_s=high(self._lags_s),
            lag_max_s=max(self._lags_s, default=0.0),
            late_p99_s=high(late_s),
        )


def high(values: Sequence[float]) -> float:
    """Nearest-rank p99; 0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))] if values else 0.0
