"""What an Accelerator holds of a training's state.

    run.track(accelerator=accelerator)
      accelerator              where it is in an accumulation, whether the last steps were skipped, how many folders save_state()
                               has numbered
      accelerator_model, …     what was prepared or registered by then, unless it is tracked under a name of its own

Prepared loaders are left out: the run keeps their position. Which parts there are is asked when the run is restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from holdfast.core.errors import HoldfastWarning
from holdfast.train.accelerate.versions import refuse_strategy

__all__ = ["AcceleratorState"]

_LISTS = {"model": "_models", "optimizer": "_optimizers", "scheduler": "_schedulers", "object": "_custom_objects"}
"""Where an Accelerator keeps what `save_state` saves."""


class AcceleratorState:
    """Tracked by the run, as an Accelerator's own counters; `parts` are tracked beside it.

    An accumulation is counted in `accelerator.step`, and `accumulate` steps the optimizer when it is a multiple of the number of
    micro-batches. A run is saved between accumulations; the count matters where one has left no gradients to see.
    """

    def __init__(self, subject: Any) -> None:
        refuse_strategy(subject.state)
        self.subject = subject
        self._known: set[int] | None = None

    def parts(self, name: str) -> Iterator[tuple[str, Any]]:
        """Each with the name that it is tracked under, the first of a kind without a number."""
        self._known = set()
        for kind, where in _LISTS.items():
            for number, part in enumerate(getattr(self.subject, where), 1):
                self._known.add(id(part))
                yield f"{name}_{kind}" if number == 1 else f"{name}_{kind}_{number}", part
        if self.subject.scaler is not None:
            yield f"{name}_scaler", self.subject.scaler

    def state(self) -> dict[str, Any]:
        self._tell_of_late_ones()
        accelerator = self.subject
        return {
            "step": accelerator.step,
            "sync_gradients": accelerator.sync_gradients,
            "skipped": [optimizer.step_was_skipped for optimizer in accelerator._optimizers],
            "folders": accelerator.project_configuration.iteration,
        }

    def load(self, tree: Any) -> None:
        accelerator = self.subject
        accelerator.step = tree["step"]
        accelerator.gradient_state._set_sync_gradients(tree["sync_gradients"])
        for optimizer, was_skipped in zip(accelerator._optimizers, tree["skipped"], strict=False):
            optimizer._is_overflow = was_skipped  # is asked for until the optimizer steps again
        numbers = accelerator.project_configuration
        numbers.iteration = max(numbers.iteration, tree["folders"])

    def describe(self) -> Any:
        return ["accelerator"]

    def _tell_of_late_ones(self) -> None:
        if self._known is None:
            return
        for kind, where in _LISTS.items():
            late = [part for part in getattr(self.subject, where) if id(part) not in self._known]
            self._known.update(map(id, late))
            for part in late:
                warnings.warn(
                    f"a {kind} ({type(part).__name__}) was prepared or registered after the run was restored, so it is in no "
                    "checkpoint. Call accelerator.prepare() and register_for_checkpointing() before the first loop",
                    HoldfastWarning,
                    stacklevel=2,
                )
