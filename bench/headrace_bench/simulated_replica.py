"""One simulated engine in virtual time.

idle ── arrival ──> stepping ── its end ──> stepping | leaping | idle
leaping: nothing but decoding until `until_s`; an arrival ends it at the iteration then under way
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from math import inf

from headrace.backends.load_publisher import MAX_ITERATIONS
from headrace.backends.simulated_engine import SimulatedEngine
from headrace.backends.simulated_report import engine_report
from headrace.backends.simulated_sequence import Step
from headrace.config import SimulatedEngine as Settings
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_router.types import Iteration, LoadReport, Replica, Transfer


class Half(Enum):
    """What of a request a replica takes."""

    WHOLE = "whole"
    PREFILL = "prefill"  # its prompt, held until it is released
    DECODE = "decode"  # its answer, once the prompt has been received


class SimulatedReplica:
    """Mutable. Whoever drives it waits until `until_s` and calls `end_step`; None: nothing to wait for."""

    __slots__ = (
        "_iterations", "_leaping", "_sequence", "_step", "_transfers", "beating", "busy_s", "engine", "link_free_s",
        "number", "prefill_tokens", "replica", "report_due", "reported_s", "requests", "started_s", "until_s",
        "version",
    )  # fmt: skip

    def __init__(self, number: int, replica: Replica, settings: Settings) -> None:
        self.number = number
        self.replica = replica
        self.engine = SimulatedEngine(settings)
        self.started_s = 0.0  # when the step or leap now under way began
        self.until_s: float | None = None  # when it will end
        self.version = 0  # grows with each `until_s`: an earlier wake-up call is void
        self.busy_s = 0.0
        self.requests = 0
        self.prefill_tokens = 0
        self.report_due = False  # for whoever delivers the reports
        self.reported_s = -inf
        self.beating = False  # a heartbeat is under way
        self.link_free_s = 0.0  # from when on its network link is idle
        self._transfers: list[Transfer] = []  # received since the last report
        self._leaping = False
        self._step: Step | None = None
        self._iterations: deque[Iteration] = deque(maxlen=MAX_ITERATIONS)
        self._sequence = 0

    def arrive(
        self, request_id: str, request: SimulatedRequest, now_s: float, half: Half = Half.WHOLE
    ) -> bool:
        """Queue a request, or a half of one. Whether `until_s` changed. Raises ValueError when it can never run."""
        changed = self._interrupt(now_s)
        self.engine.add(
            request_id,
            request.prompt_tokens,
            1 if half is Half.PREFILL else request.answer_tokens,
            request.hashes,
            holds=half is Half.PREFILL,
            is_external=half is Half.DECODE,
        )
        if half is not Half.PREFILL:
            self.requests += 1
        return self._go_on(now_s) or changed

    def received(self, request_id: str, transfer: Transfer | None, now_s: float) -> bool:
        """A prompt has arrived; None: it never will. Whether `until_s` changed."""
        changed = self._interrupt(now_s)
        if transfer is None:
            self.engine.not_received(request_id)
        else:
            self.engine.received(request_id)
            self._transfers.append(transfer)
        return self._go_on(now_s) or changed

    def release(self, request_id: str, now_s: float) -> bool:
        """A prompt computed here has been taken elsewhere. Whether `until_s` changed."""
        changed = self._interrupt(now_s)
        self.engine.release(request_id)
        return self._go_on(now_s) or changed

    def _interrupt(self, now_s: float) -> bool:
        """End a leap at the iteration now under way. Whether `until_s` changed."""
        changed = False
        if self._leaping:
            self._leaping = False
            if now_s > self.started_s:
                step = self.engine.step(now_s - self.started_s)
                assert step is not None, "a leap is planned over running sequences"
                self._wait_for(step)
                changed = True
            else:
                self.until_s = None
        return changed

    def _go_on(self, now_s: float) -> bool:
        if self.until_s is not None:
            return False
        self.begin(now_s)
        return True

    def begin(self, now_s: float) -> None:
        """Start the next step or leap, if there is anything to do."""
        self.started_s = now_s
        self.version += 1
        leap_s = self.engine.leap_s()
        if leap_s > 0:
            self._leaping = True
            self.until_s = now_s + leap_s
            return
        step = self.engine.step()
        if step is None:
            self.until_s = None
        else:
            self._wait_for(step)

    def end_step(self) -> Step:
        """The step or leap that ends now. The caller then calls `begin`."""
        if self._leaping:
            self._leaping = False
            self._step = self.engine.step(inf)
        step, self._step = self._step, None
        assert step is not None
        self.until_s = None
        self.busy_s += step.duration_s
        self.prefill_tokens += step.prefill_tokens
        self._iterations.append(step.iteration)
        return step

    def report(self, now_s: float) -> LoadReport:
        """The load now, with the iterations since the last report."""
        self._sequence += 1
        self.report_due = False
        self.reported_s = now_s
        iterations = tuple(self._iterations)
        self._iterations.clear()
        transfers = tuple(self._transfers)
        self._transfers.clear()
        replica = self.replica
        return engine_report(
            self.engine,
            self._step,
            replica.id,
            replica.boot_id,
            sequence=self._sequence,
            iterations=iterations,
            transfers=transfers,
        )

    def _wait_for(self, step: Step) -> None:
        self._step = step
        self.version += 1
        self.until_s = self.started_s + step.duration_s
