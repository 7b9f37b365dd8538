"""How much of the work that was done on this machine is kept: time of training that a durable checkpoint holds.

    progress page, once a second → when was which step reached, and after how much training → time at the newest durable step

A restart on this machine begins at an older step; what lay behind it is lost, and counts once it has been done again.
"""

from __future__ import annotations

from bisect import bisect_right

from holdfast.core.contract import Phase, Progress

__all__ = ["KeptWork"]

_WORKING = (Phase.TRAINING, Phase.EVALUATING)


class KeptWork:
    """Thread safety: one thread looks; the figures may be read from any."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._trained_s: list[float] = []
        """After how much training each of these steps was seen; both ascend."""
        self._worked_s = 0.0
        self._looked_s: float | None = None
        self._attempt = 0
        self.step = self.kept_step = 0
        self.kept_s = 0.0

    def look(self, progress: Progress | None, now_s: float) -> None:
        before_s, self._looked_s = self._looked_s, now_s
        if progress is None or progress.phase in (Phase.STARTING, Phase.RESTORING):
            # Where it begins is not known yet.
            return
        if progress.attempt != self._attempt:
            self._begin(progress)
            before_s = None
        if before_s is not None and progress.phase in _WORKING:
            self._worked_s += now_s - before_s
        if progress.step > self._steps[-1]:
            self._steps.append(progress.step)
            self._trained_s.append(self._worked_s)
        self._keep(progress)

    def _begin(self, progress: Progress) -> None:
        """Another attempt has claimed the run: it has what was durable when it began."""
        self._attempt = progress.attempt
        start = max(progress.restored_step, 0)
        place = max(bisect_right(self._steps, start), 1)
        del self._steps[place:], self._trained_s[place:]
        self._worked_s = self._trained_s[-1] if self._trained_s else 0.0
        if not self._steps or self._steps[0] > start:
            # Older than all that was seen here: nothing of this machine's work is in it.
            self._steps, self._trained_s, self._worked_s = [start], [0.0], 0.0

    def _keep(self, progress: Progress) -> None:
        place = bisect_right(self._steps, progress.kept_step)
        self.step, self.kept_step = max(progress.step, 0), progress.kept_step
        self.kept_s = self._trained_s[place - 1] if place else 0.0
        # An older checkpoint than the newest is seldom needed: a few hundred of the moments before stay.
        if place > 512:
            del self._steps[1 : place - 256], self._trained_s[1 : place - 256]
