"""Loops with `accelerate.Accelerator` as holdfast runs:

    with holdfast.Run("s3://bucket/runs/gpt") as run:
        run.track(accelerator=accelerator)                 # all that it has prepared or registered
        for batch in run.batches(loader, epochs=3): ...    # the prepared loader

versions.py   which accelerate, and what of it; said at the start
state.py      what an Accelerator holds of a training's state, one tracked object each

Nothing here imports accelerate: what comes from it is recognised where it is met.
"""

from holdfast.train.accelerate.state import AcceleratorState
from holdfast.train.accelerate.versions import check_loader, is_accelerator, is_from_accelerate, refuse_strategy

__all__ = ["AcceleratorState", "check_loader", "is_accelerator", "is_from_accelerate", "refuse_strategy"]
