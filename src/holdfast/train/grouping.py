"""Steps of several of the loader's batches: what a script means that accumulates gradients over a fixed number of them.

    the loader's batches   ──┬ 0 ┬ 1 ┬ 2 ┬ 3 ┬ 4 ┬ 5 ┬ 6 ┬──
    steps of three         ──┴─────0─────┴─────1─────┴─2─┴──    the last step of an epoch may have fewer

Unlike a `global_batch`, which is a number of samples, batches stay exactly as the loader makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from holdfast.core.errors import UsageError
from holdfast.data.global_batch import Micro

__all__ = ["StepGroup"]


class StepGroup:
    """Counts the batches of one pass. `is_over` says whether an epoch has nothing after so many batches of so many samples."""

    def __init__(self, is_over: Callable[[int, int], bool]) -> None:
        self._is_over = is_over
        self.size = 1
        self._batches = self._samples = self._index = 0
        self._step_samples: int | None = 0

    def resize(self, size: int) -> None:
        """From the next pass on, a step has so many batches."""
        if type(size) is not int or size < 1:
            raise UsageError(f"batches_per_step is a number of batches, 1 or more, not {size!r}")
        self.size = size

    def batches_in(self, steps: int, per_epoch: int | None) -> int:
        """How many batches so many steps of an epoch have."""
        batches = steps * self.size
        return batches if per_epoch is None or self.size == 1 else min(batches, per_epoch)

    def steps_in(self, batches: int | None) -> int | None:
        return None if batches is None else -(-batches // self.size)

    def begin(self, batches: int, samples: int) -> None:
        """A pass begins after so many batches, at the start of a step."""
        self._batches, self._samples, self._index, self._step_samples = batches, samples, 0, 0

    def micro(self, piece: Micro) -> Micro:
        """What there is to say about the next batch, which is `piece` to the loader."""
        if self.size == 1:
            return piece
        known = None if self._step_samples is None or piece.batch_samples is None else piece.batch_samples
        self._step_samples = None if known is None or self._step_samples is None else self._step_samples + known
        self._batches, self._samples, index = self._batches + 1, self._samples + (known or 0), self._index
        is_last = index + 1 == self.size or self._is_over(self._batches, self._samples)
        count = index + 1 if is_last else self.size
        made = replace(piece, index=index, count=count, weight=1.0, batch_samples=self._step_samples)
        self._index = 0 if is_last else index + 1
        if is_last:
            self._step_samples = 0
        return made
