"""What a plan assumes where nothing was said or measured: one table, with ranges, each with its reason.

The ranges matter more than the figures: `sensitivity` shows which of them decide, `pilot` how to replace them.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.simulate.planner.case import Case, Hardware
from holdfast.simulate.planner.figures import Figure, Origin, fixed

__all__ = ["LABELS", "LAUNCH_S", "Assumptions", "assume"]

_GIB = 1 << 30
_MIB = 1 << 20
LAUNCH_S = 180.0
"""Of a machine, until its first program starts."""
_SETUP_S = 120.0
_COPY_BYTES_PER_S = 4 * _GIB
_PLENTIFUL = frozenset({"T4", "L4", "A10G", "A10"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Everything that a plan takes to be true of the market and the loop. Of one machine, unless said otherwise."""

    life_s: Figure
    outage_s: Figure
    shape: Figure
    gang: Figure
    """A gang of n machines lasts 1/n^this as long as one: 0 if all go together, 1 if each goes by itself."""
    spot_price: Figure
    """By the price in the table."""
    work: Figure
    """By the work that was said."""
    changeover_s: Figure
    checkpoint_bytes: Figure
    """Of the whole job."""
    bandwidth: Figure
    stall_s: Figure
    step_s: Figure
    task_s: Figure
    heard: Figure
    """Share of the preemptions of which the notice comes as long before as it should."""


LABELS = {
    "life_s": "mean life of spot capacity (one machine)",
    "outage_s": "mean outage of spot capacity",
    "shape": "shape of lifetimes (1: no memory)",
    "gang": "how much shorter a gang lasts (exponent)",
    "spot_price": "spot price, by the table's",
    "work": "work, by your estimate",
    "changeover_s": "changeover: launch, set-up, restore",
    "checkpoint_bytes": "checkpoint size",
    "bandwidth": "bandwidth to the store, one machine",
    "stall_s": "stall of one save",
    "step_s": "step time",
    "task_s": "length of one task",
    "heard": "share of notices heard in time",
}


def assume(case: Case, hardware: Hardware) -> Assumptions:
    """Known figures as they are, and the table's for the rest."""
    known = case.known
    life, outage = _market(hardware.accelerator.name)
    size = known.checkpoint_bytes or _size(case, hardware)
    bandwidth = known.bandwidth or Figure(
        400 * _MIB, 100 * _MIB, 1536 * _MIB, Origin.ASSUMED, "object stores differ by machine type and region"
    )
    each_bytes = size.likely / case.machines if case.saves else 0.0
    return Assumptions(
        life_s=known.life_s or life,
        outage_s=known.outage_s or outage,
        shape=Figure(0.6, 0.5, 1.0, Origin.ASSUMED, "Weibull; 0.57 to 0.79 in public traces of spot machines"),
        gang=_gang(case),
        spot_price=Figure(1.0, 0.7, 1.5, Origin.ASSUMED, "spot prices move; the table has one day's"),
        work=Figure(1.0, 0.9, 1.25, Origin.ASSUMED, "estimates run over more often than under"),
        changeover_s=known.changeover_s or _changeover(each_bytes / max(bandwidth.likely, 1.0)),
        checkpoint_bytes=size,
        bandwidth=bandwidth,
        stall_s=known.stall_s or _stall(each_bytes),
        step_s=known.step_s or Figure(1.0, 0.1, 10.0, Origin.ASSUMED, ""),
        task_s=_task(case),
        heard=_heard(case, hardware),
    )


def _market(kind: str) -> tuple[Figure, Figure]:
    """How long spot capacity lasts, and stays away."""
    if kind == "CPU":
        why = "CPU machines are plentiful; no public trace"
        return (
            Figure(24 * 3600.0, 6 * 3600.0, 7 * 86400.0, Origin.ASSUMED, why),
            Figure(600.0, 120.0, 3600.0, Origin.ASSUMED, why),
        )
    if kind in _PLENTIFUL:
        why = "small GPUs are plentiful; no public trace"
        return (
            Figure(8 * 3600.0, 2 * 3600.0, 48 * 3600.0, Origin.ASSUMED, why),
            Figure(1200.0, 300.0, 7200.0, Origin.ASSUMED, why),
        )
    why = "public traces of V100 spot machines: 0.75 to 5 h; nothing public on newer types"
    return (
        Figure(4 * 3600.0, 3600.0, 24 * 3600.0, Origin.ASSUMED, why),
        Figure(3600.0, 600.0, 6 * 3600.0, Origin.ASSUMED, "varies most of all, by region and week"),
    )


def _gang(case: Case) -> Figure:
    if case.tasks or case.machines - case.floor <= 1:
        return fixed(0.0, Origin.COMPUTED, "one machine, or machines that do not wait for each other")
    return Figure(0.5, 0.2, 1.0, Origin.ASSUMED, "machines of one pool go neither all together nor one by one")


def _size(case: Case, hardware: Hardware) -> Figure:
    if not case.saves:
        return fixed(0.0, Origin.GIVEN, "no checkpoints")
    memory = max(pool.gpu_memory_gib for pool in hardware.pools) * hardware.accelerator.count * case.machines * _GIB
    if memory == 0 or hardware.accelerator.name == "CPU":
        return Figure(1.0 * _GIB, 0.1 * _GIB, 10.0 * _GIB, Origin.ASSUMED, "no GPU memory to go by")
    return Figure(
        0.25 * memory,
        0.05 * memory,
        0.75 * memory,
        Origin.ASSUMED,
        "a quarter of all GPU memory; give --checkpoint-size",
    )


def _changeover(restore_s: float) -> Figure:
    likely = LAUNCH_S + _SETUP_S + restore_s
    return Figure(
        likely, likely / 2, likely * 2.5, Origin.ASSUMED, "3 min launch, 2 min set-up, and reading the checkpoint"
    )


def _stall(each_bytes: float) -> Figure:
    likely = each_bytes / _COPY_BYTES_PER_S
    return Figure(likely, likely / 4, likely * 4, Origin.ASSUMED, "copying the state to memory at 4 GiB/s")


def _task(case: Case) -> Figure:
    if case.task_s is not None:
        return fixed(case.task_s, Origin.GIVEN)
    if case.tasks:
        return Figure(1800.0, 300.0, 3 * 3600.0, Origin.ASSUMED, "an interrupted task begins anew")
    return fixed(0.0, Origin.COMPUTED, "not tasks")


def _heard(case: Case, hardware: Hardware) -> Figure:
    if case.known.notice_s is not None and case.known.notice_s.likely == 0:
        return fixed(0.0, Origin.GIVEN, "no notice")
    if {pool.provider for pool in hardware.pools} == {"aws"}:
        return Figure(0.95, 0.8, 1.0, Origin.ASSUMED, "AWS: two minutes, best effort")
    return Figure(0.9, 0.7, 1.0, Origin.ASSUMED, "30 s, best effort")
