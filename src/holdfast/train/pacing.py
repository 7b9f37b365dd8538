"""Is a save due? The triggers that the user named, the automatic interval, and what saves have been measured to cost the loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, median, pstdev

from holdfast.core.clock import Clock
from holdfast.policy.interval import (
    Auto,
    AutoContext,
    EveryEpoch,
    EverySteps,
    IntervalDecision,
    LoopState,
    LostShare,
    LostTime,
    PreemptionRate,
    Trigger,
    auto_interval,
    due,
    max_lost_work_s,
)
from holdfast.policy.spread import Spread

__all__ = ["CostMeter", "Pacing"]

_FIRST_GUESS_S = 1.0
"""What a save is taken to cost before one has been measured."""
_FEW = 3


class CostMeter:
    """What one save costs the loop: the stall, plus how much slower steps are while it is being written."""

    def __init__(self, before_s: float | None = None) -> None:
        """`before_s`: what an attempt before has measured."""
        self._before_s = before_s
        self._stalls_s: deque[float] = deque(maxlen=9)
        self._steps_s: deque[float] = deque(maxlen=32)
        self._quiet_s, self._quiet_steps = 0.0, 0
        self._busy_s, self._busy_steps, self._saves = 0.0, 0, 0

    def stepped(self, seconds: float, busy: bool) -> None:
        self._steps_s.append(seconds)
        if busy:
            self._busy_s += seconds
            self._busy_steps += 1
        else:
            self._quiet_s += seconds
            self._quiet_steps += 1

    def saved(self, stall_s: float) -> None:
        self._stalls_s.append(stall_s)
        self._saves += 1

    def step_time(self) -> Spread | None:
        """Seconds per step and how they scatter, from this attempt's own; None before a few of them. May be asked by any thread."""
        steps_s = list(self._steps_s)
        if len(steps_s) < _FEW:
            return None
        average_s = fmean(steps_s)
        return Spread(average_s, pstdev(steps_s) / average_s) if average_s > 0 else None

    @property
    def cost_s(self) -> float:
        return self.measured_s or self._before_s or _FIRST_GUESS_S

    @property
    def measured_s(self) -> float | None:
        """By this attempt; None before its first save."""
        if not self._stalls_s:
            return None
        slowdown_s = 0.0
        if self._busy_steps and self._quiet_steps:
            slowdown_s = self._busy_s - self._busy_steps * self._quiet_s / self._quiet_steps
        return max(1e-6, median(self._stalls_s) + max(0.0, slowdown_s) / self._saves)


class Pacing:
    """Decides at step boundaries. Owned by the loop's thread."""

    def __init__(
        self,
        triggers: Sequence[Trigger],
        bound: LostTime | LostShare | None,
        rate: PreemptionRate,
        clock: Clock,
        *,
        save_cost_s: float | None = None,
    ) -> None:
        """`rate`, `save_cost_s`: what the attempts before have seen. `bound`: None where nobody has set one."""
        self._everywhere = tuple(trigger for trigger in triggers if isinstance(trigger, EverySteps | EveryEpoch))
        self._here = tuple(trigger for trigger in triggers if trigger not in self._everywhere)
        self._bound, self._rate, self._clock = bound, rate, clock
        self._is_auto = any(isinstance(trigger, Auto) for trigger in triggers)
        self.meter = CostMeter(save_cost_s)
        self._saved_step = self._started_step = 0
        self._saved_s = self._boundary_s = self._started_s = clock.monotonic_s()
        self.decision = IntervalDecision(float("inf"), ())

    def begin(self, step: int) -> None:
        """The loop starts (again) at `step`, whose state is already saved or is the initial one."""
        self._saved_step = self._started_step = step
        self._saved_s = self._boundary_s = self._started_s = self._clock.monotonic_s()
        self.decide(0.0, None)

    def decide(self, commit_s: float, expected_runtime_s: float | None) -> None:
        """Choose the automatic interval anew from what has been measured."""
        if self._is_auto:
            bound_s = None if self._bound is None else max_lost_work_s(self._bound, expected_runtime_s)
            rate = self._rate.observed(0, self.elapsed_s)
            self.decision = auto_interval(
                AutoContext(
                    save_cost_s=self.meter.cost_s,
                    commit_s=commit_s,
                    rate=rate,
                    notice_share=rate.notice_share,
                    max_lost_work_s=bound_s,
                )
            )

    def follow(self) -> None:
        """Another rank watches the time: only what depends on the number of the step is decided here."""
        self._here, self._is_auto = (), False

    def boundary(self, step: int, *, epoch_ended: bool, busy: bool) -> tuple[str | None, bool]:
        """Called at every boundary: why a save is due, or None; and whether it is due on all ranks at this step."""
        now_s = self._clock.monotonic_s()
        if not epoch_ended:
            self.meter.stepped(now_s - self._boundary_s, busy)
        self._boundary_s = now_s
        state = LoopState(step, step - self._saved_step, now_s - self._saved_s, epoch_ended)
        everywhere = due(self._everywhere, state, self.decision.interval_s)
        if everywhere is not None:
            return everywhere, True
        return due(self._here, state, self.decision.interval_s), False

    @property
    def began_at(self) -> int:
        """The step that this attempt began with."""
        return self._started_step

    def unsaved_steps(self, step: int) -> int:
        return step - self._saved_step

    def saved(self, step: int, stall_s: float) -> None:
        """A snapshot of `step` was taken."""
        self._saved_step = step
        self._saved_s = self._boundary_s = self._clock.monotonic_s()
        self.meter.saved(stall_s)

    @property
    def elapsed_s(self) -> float:
        return self._clock.monotonic_s() - self._started_s

    def seconds_per_step(self, step: int) -> float | None:
        """The pace of this attempt; None before its first step."""
        steps = step - self._started_step
        return self.elapsed_s / steps if steps > 0 else None
