"""The part of `holdfast.Run` that is about batches: the loop over them, the micro-batch at hand, and how to keep a global batch.

run.batches → loops.py, which counts steps; what a micro-batch is: data/global_batch.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from holdfast.checkpoint.staging import available_memory_bytes
from holdfast.core.errors import UsageError
from holdfast.data.batch_plan import BatchPlan, plan_batch
from holdfast.data.global_batch import Micro
from holdfast.train.loops import Loops
from holdfast.train.place import Place

__all__ = ["Batching"]

Batch = TypeVar("Batch")
_USABLE = 0.9
"""The share of free memory to plan with: allocators lose some to fragments, kernels take some for a while."""


class Batching:
    """Mixed into the run, which has these."""

    _loops: Loops
    _place: Place

    def _opened(self) -> object:
        raise NotImplementedError

    def batches(
        self,
        loader: Iterable[Batch],
        *,
        epochs: int | None = None,
        global_batch: int | None = None,
        batches_per_step: int = 1,
    ) -> Iterator[Batch]:
        """The batches that are left of this epoch, starting at the exact next one; with `epochs`, of all epochs in one loop.

        Inside `epochs()`, several loops over batches may follow each other in one epoch; those that are done are skipped. Code
        between two loops runs again when the second is resumed. Outside of `epochs()` and without `epochs`, it is one pass.

        Every rank of a job gets its part of one order. Without `global_batch`, each iteration is a step, and a step takes the
        loader's `batch_size` on every rank: another number of ranks makes it larger or smaller, which is told. With
        `global_batch`, a step takes so many samples in all, on any number of ranks; the loop yields them in micro-batches of at
        most `batch_size`, and `run.step` counts when the last of them is done:

            for x, y in run.batches(loader, epochs=3, global_batch=512):
                with run.accumulating(model):
                    loss = criterion(model(x), y) * run.micro.weight        # criterion: the mean over the micro-batch
                    loss.backward()
                if run.micro.last:
                    optimizer.step()
                    optimizer.zero_grad()

        With `batches_per_step`, a step is so many batches as the loader makes them, fewer at the end of an epoch. `run.micro.last`
        says when it is complete; how to weigh the losses (`run.micro.weight` is 1) is up to the script.
        """
        if global_batch is not None and batches_per_step != 1:
            raise UsageError("global_batch= and batches_per_step= both say how large a step is: give one of them")
        self._opened()
        yield from self._loops.batches(loader, epochs, global_batch, batches_per_step)

    @property
    def micro(self) -> Micro:
        """The micro-batch at hand: `index`, `count`, `last`, `samples`, `weight`. In a loop without `global_batch`, the whole
        batch.

        `weight` makes a mean loss count every sample of the step once, however the step is cut into ranks and micro-batches, also
        in a tail that leaves a rank with fewer samples than another, or with a repeated one (weight 0): `(loss *
        run.micro.weight).backward()`.
        """
        return self._place.micro

    @contextmanager
    def accumulating(self, *models: Any) -> Iterator[None]:
        """Forward and backward of one micro-batch: gradients go over the network with the last one of the step only.

        Takes DistributedDataParallel and fully_shard modules; for others it does nothing.

            with run.accumulating(model):
                (criterion(model(x), y) * run.micro.weight).backward()
        """
        with ExitStack() as stack:
            if not self.micro.last:
                for model in models:
                    _withhold_gradients(model, stack)
            yield

    def plan_batch(
        self, *, global_batch: int, memory_bytes_per_sample: float | None = None, micro_batch: int | None = None
    ) -> BatchPlan:
        """A `batch_size` for the loader with which this job, on this hardware, makes steps of `global_batch` samples.

        Give the most samples that fit, or what one more takes of the device's memory (of the machine's, where there is no GPU). In
        the second case, call it on every rank, once the model and the optimizer's state are where they will be: the rank with the
        least free memory decides.

            plan = run.plan_batch(global_batch=512, memory_bytes_per_sample=180e6)
            loader = DataLoader(data, batch_size=plan.micro_batch, shuffle=True)
            for batch in run.batches(loader, epochs=3, global_batch=plan.global_batch): ...
        """
        memory = None if memory_bytes_per_sample is None else _least(int(_free_bytes() * _USABLE))
        return plan_batch(
            global_batch,
            _world_size(),
            micro_batch=micro_batch,
            memory_bytes_per_sample=memory_bytes_per_sample,
            memory_bytes=memory,
        )


def _withhold_gradients(model: Any, stack: ExitStack) -> None:
    """Until `stack` is left. DDP and FSDP1 have a context for it, fully_shard a switch."""
    if callable(getattr(model, "no_sync", None)):
        stack.enter_context(model.no_sync())
    elif callable(getattr(model, "set_requires_gradient_sync", None)):
        model.set_requires_gradient_sync(False)
        stack.callback(model.set_requires_gradient_sync, True)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _world_size() -> int:
    """Of the job, also before the run is open."""
    return dist.get_world_size() if _in_group() else int(os.environ.get("WORLD_SIZE") or 1)


def _free_bytes() -> int:
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return available_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _least(count: int) -> int:
    """Over all ranks: they must agree, or they would enter collectives a different number of times."""
    if not _in_group():
        return count
    device = "cpu" if "gloo" in dist.get_backend() else torch.device("cuda", torch.cuda.current_device())
    found = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found.item())
