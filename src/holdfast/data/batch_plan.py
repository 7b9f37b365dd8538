"""How to keep a global batch on other hardware: which micro-batch fits, and how many of them make a step.

The number of samples in a step belongs to the experiment; how they are spread over ranks and over time does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.config import format_bytes
from holdfast.core.errors import UsageError
from holdfast.data.global_batch import check_global_batch

__all__ = ["BatchPlan", "plan_batch"]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`DataLoader(batch_size=plan.micro_batch)` and `run.batches(loader, global_batch=plan.global_batch)`.

    `accumulation`: micro-batches of a full step, on every rank. `reasons`: for people, one line each.
    """

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int
    reasons: tuple[str, ...]


def plan_batch(
    global_batch: int,
    world_size: int,
    *,
    micro_batch: int | None = None,
    memory_bytes_per_sample: float | None = None,
    memory_bytes: int | None = None,
) -> BatchPlan:
    """The fewest micro-batches, and those as equal as they can be.

    `micro_batch`: the most samples that fit; or `memory_bytes_per_sample`: what one more sample takes, of `memory_bytes` that are
    there for samples on every device. Raises UsageError where a single sample does not fit.
    """
    check_global_batch(global_batch, world_size)
    reasons: list[str] = []
    if (micro_batch is None) == (memory_bytes_per_sample is None):
        raise UsageError(
            "plan_batch() needs micro_batch= (the most samples that fit) or memory_bytes_per_sample=, one of them"
        )
    if micro_batch is not None:
        if type(micro_batch) is not int or micro_batch < 1:
            raise UsageError(
                f"micro_batch is the most samples that fit on one device: an integer from 1, not {micro_batch!r}"
            )
        fits = micro_batch
        reasons.append(f"at most {fits} samples at a time, as asked")
    else:
        fits = _fitting(memory_bytes_per_sample, memory_bytes)
        reasons.append(
            f"{format_bytes(memory_bytes or 0)} of memory for samples, {format_bytes(int(memory_bytes_per_sample or 0))} for each: "
            f"{fits} fit"
        )
    largest = -(-global_batch // world_size)
    accumulation = -(-largest // fits)
    micro = -(-largest // accumulation)
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    reasons.append(f"{global_batch} samples over {ranks}: {largest} on the rank that has the most")
    if accumulation == 1:
        reasons.append("they fit at once: no accumulation")
    else:
        reasons.append(f"{accumulation} micro-batches of at most {micro}: the fewest that fit, of equal size")
    if micro * accumulation * world_size != global_batch:
        reasons.append("sizes differ by one sample between micro-batches: weigh each loss with run.micro.weight")
    return BatchPlan(global_batch, world_size, micro, accumulation, tuple(reasons))


def _fitting(memory_bytes_per_sample: float | None, memory_bytes: int | None) -> int:
    if not isinstance(memory_bytes_per_sample, int | float) or not 0 < memory_bytes_per_sample < float("inf"):
        raise UsageError(f"memory_bytes_per_sample is a number of bytes above 0, not {memory_bytes_per_sample!r}")
    if memory_bytes is None:
        raise UsageError("how much memory there is for samples is not known here: pass micro_batch= instead")
    fits = int(memory_bytes // memory_bytes_per_sample)
    if fits < 1:
        raise UsageError(
            f"one sample takes {format_bytes(int(memory_bytes_per_sample))}, and {format_bytes(max(memory_bytes, 0))} are free for "
            "samples: free memory (activation checkpointing, a sharded model) or use larger devices"
        )
    return fits
