"""The callback that makes a Lightning training a holdfast run. When `trainer.fit()` sets itself up, it has that Trainer driven
(driving.py); in `validate()`, `test()` and `predict()` it does nothing.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any, Self

from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.lightning.driving import Driver
from holdfast.train.lightning.refusals import refuse_trainer
from holdfast.train.lightning.versions import base_classes, check_parts
from holdfast.train.run import Run

__all__ = ["Callback"]


class Callback:
    """Makes a Trainer survive being killed: `Trainer(..., callbacks=[Callback("s3://bucket/runs/gpt")])`, and plain
    `trainer.fit(model, loader)`.

    Takes what `holdfast.Run` takes. The seed of the data order is the one of `seed_everything`, else torch's; progress lines are
    left to the Trainer. The run is restored when `fit()` begins to train, if it has a checkpoint; it is marked as finished when
    the training is complete; a notice ends the process with exit code 75, as with every run.

    An object of this class is also one of `lightning.pytorch.Callback` or of `pytorch_lightning.Callback`, whichever the script
    has imported.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        kind: Any = cls
        made: Self = object.__new__(_with_bases(kind, base_classes()))
        return made

    def __init__(self, url: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._url, self._options = url, options
        self._driver: Driver | None = None
        self._make_run()  # so that what is wrong with its options shows now

    @property
    def run(self) -> Run:
        """While it trains. Raises UsageError before and after."""
        if self._driver is None or self._driver.run is None:
            raise UsageError("the callback has a run while trainer.fit() trains, and neither before nor after it")
        return self._driver.run

    def _make_run(self) -> Run:
        seeded = os.environ.get("PL_GLOBAL_SEED")
        return Run(self._url, **{"seed": int(seeded) if seeded else None, "progress": False, **self._options})

    # ---- the Trainer's events

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.fast_dev_run:
            warnings.warn("fast_dev_run: this training is tried out without a holdfast run, and leaves none behind",
                          HoldfastWarning, stacklevel=2)  # fmt: skip
            return
        if sum(isinstance(callback, Callback) for callback in trainer.callbacks) > 1:
            raise UsageError("two holdfast callbacks for one Trainer: a training is one run, under one URL")
        check_parts(trainer)
        refuse_trainer(trainer)
        self._driver = Driver(trainer, self, self._make_run)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._driver is not None:
            self._driver.let_go()


@functools.cache
def _with_bases(kind: type[Any], bases: tuple[type[Any], ...]) -> type[Any]:
    """`kind`, as a kind of Lightning's callbacks as well."""
    lacking = tuple(base for base in bases if not issubclass(kind, base))
    return type(kind.__name__, (kind, *lacking), {"__module__": kind.__module__, "__doc__": kind.__doc__})
