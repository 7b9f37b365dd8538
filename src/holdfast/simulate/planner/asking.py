"""A job file, flags and a measured run, brought together to one case. What was said on the command line comes first, then what was
measured, then what the file says; what nobody said is left to `assumed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from holdfast.core.errors import UsageError
from holdfast.core.jobfile import Accelerator, CheckpointBlock, Deadline, JobFile, parse_floor
from holdfast.policy.market.rules_parse import parse_rules
from holdfast.simulate.planner.assumed import assume
from holdfast.simulate.planner.case import Case, Hardware, Known
from holdfast.simulate.planner.figures import Figure, Origin, fixed
from holdfast.simulate.planner.measured import Measured, with_measured
from holdfast.simulate.planner.prices import Price, Where, parse_where, priced

__all__ = ["Asked", "case_of"]

_Said = TypeVar("_Said")
_NOT_PLANNED = ("opportunistic", "fallback_after", "start_window", "run_window", "reserved")
"""Rules that are for the launcher: they are checked here, so that a plan does not pass over a mistake."""
_SERVED_S = 3600.0
"""A server has no work to finish; prices are per hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says; None: nothing. Quantities in base units."""

    work_s: float | None = None
    on: tuple[tuple[Accelerator, float | None], ...] = ()
    """Hardware, and the work on it where it differs."""
    nodes: int | None = None
    pools: tuple[str, ...] = ()
    deadline: Deadline | None = None
    budget_usd: float | None = None
    ceiling_usd_h: float | None = None
    floor: str | None = None
    checkpoint_bytes: float | None = None
    no_checkpoint: bool = False
    bandwidth: float | None = None
    stall_s: float | None = None
    save_every: str | None = None
    step_s: float | None = None
    changeover_s: float | None = None
    notice_s: float | None = None
    life_s: float | None = None
    outage_s: float | None = None
    tasks: bool = False
    task_s: float | None = None
    serving: bool = False
    price_spot: float | None = None
    price_on_demand: float | None = None
    engineering_hours: float | None = None
    hourly_rate: float | None = None
    confidence: float = 0.95


def case_of(
    asked: Asked, job: JobFile | None, table: Sequence[Price], *, now_unix_s: float, measured: Measured | None = None
) -> Case:
    """One case. UsageError says what is missing."""
    job = job or JobFile()
    block = job.checkpoint if isinstance(job.checkpoint, CheckpointBlock) else None
    machines = job.num_nodes if asked.nodes is None else asked.nodes
    floor = job.on_demand_floor if asked.floor is None else asked.floor
    serving = asked.serving or job.plan.serving
    hardware = _hardware(asked, job, table, serving)
    tasks = asked.tasks or job.plan.tasks
    size_said = asked.checkpoint_bytes is not None or block is not None
    deadline = asked.deadline or job.deadline
    hours, rate = (
        _first(asked.engineering_hours, job.plan.engineering_hours),
        _first(asked.hourly_rate, job.plan.hourly_rate),
    )
    if hours and rate is None:
        raise UsageError("engineering hours cost something: give --hourly-rate")
    known = _known(asked, job, block)
    case = Case(
        name=job.name or "job",
        hardware=hardware,
        machines=machines,
        floor=0 if floor is None else parse_floor(floor, machines),
        deadline_s=None if deadline is None else deadline.left_s(now_unix_s),
        budget_usd=_first(asked.budget_usd, job.budget),
        ceiling_usd_h=_first(asked.ceiling_usd_h, job.max_price, job.resources.max_hourly_cost),
        must_be_spot=job.spot_policy == "spot",
        tasks=tasks,
        task_s=_first(asked.task_s, job.plan.task_time),
        serving=serving,
        saves=not (asked.no_checkpoint or job.checkpoint == "none" or (tasks and not size_said)),
        save_every=asked.save_every or (block.save_every if block else None) or "auto",
        max_lost_work=block.max_lost_work if block else None,
        known=known,
        engineering_usd=(hours or 0.0) * (rate or 0.0),
        confidence=asked.confidence,
        notes=tuple(_notes(job, measured)),
    )
    if measured is None:
        return case
    believed = assume(case, hardware[0]).life_s
    return replace(case, known=with_measured(known, measured, believed))


def _first(*said: _Said | None) -> _Said | None:
    return next((each for each in said if each is not None), None)


def _known(asked: Asked, job: JobFile, block: CheckpointBlock | None) -> Known:
    plan = job.plan

    def figure(said: float | None, filed: float | None) -> Figure | None:
        if said is not None:
            return fixed(float(said), Origin.GIVEN)
        return None if filed is None else fixed(float(filed), Origin.JOB_FILE)

    known = Known(
        life_s=figure(asked.life_s, plan.mean_life),
        outage_s=figure(asked.outage_s, plan.mean_outage),
        changeover_s=figure(asked.changeover_s, plan.changeover),
        stall_s=figure(asked.stall_s, block.stall if block else None),
        bandwidth=figure(asked.bandwidth, block.bandwidth if block else None),
        checkpoint_bytes=figure(asked.checkpoint_bytes, block.size if block else None),
        step_s=figure(asked.step_s, plan.step_time),
        notice_s=figure(asked.notice_s, plan.notice),
    )
    for name in ("life_s", "outage_s", "bandwidth", "step_s"):
        value = getattr(known, name)
        if value is not None and value.likely <= 0:
            raise UsageError(f"{name.removesuffix('_s').replace('_', ' ')} is more than zero")
    return known


def _hardware(asked: Asked, job: JobFile, table: Sequence[Price], serving: bool) -> tuple[Hardware, ...]:
    wanted = _wanted(asked, job)
    if (asked.price_spot is not None or asked.price_on_demand is not None) and len(wanted) > 1:
        raise UsageError("--price-spot and --price-on-demand are of one kind of machine; name one with --on")
    by_name = {name if name is None else name.lower(): work for name, work in job.plan.work_s.items()}
    found = []
    for accelerator, (work_s, where) in wanted.items():
        said = _first(work_s, asked.work_s, by_name.get(str(accelerator).lower()), by_name.get(None))
        if said is None:
            if not serving:
                raise UsageError(
                    f"how long does the work take on {accelerator}? Give --work 48h, or plan: {{work: 48h}}"
                )
            said = _SERVED_S
        found.append(Hardware(accelerator, said, _pools(asked, accelerator, where, table)))
    return tuple(found)


def _wanted(asked: Asked, job: JobFile) -> dict[Accelerator, tuple[float | None, list[Where]]]:
    """Each kind once, with where it may be."""
    named = [parse_where(text) for text in asked.pools]
    wanted: dict[Accelerator, tuple[float | None, list[Where]]] = {}
    if asked.on:
        return {accelerator: (work_s, named) for accelerator, work_s in asked.on}
    for resources in job.resources.alternatives():
        kinds = resources.wanted
        if not kinds and resources.cpus is not None:
            count = str(resources.cpus).rstrip("+")
            kinds = (Accelerator("CPU", int(float(count))),) if count.replace(".", "", 1).isdigit() else ()
        where = named
        if not named and (resources.infra is not None or resources.instance_type is not None):
            where = [parse_where(resources.infra or "*", resources.instance_type)]
        for kind in kinds:
            before = wanted.get(kind)
            # A place that is not narrowed down is every place.
            places = [] if before and (not before[1] or not where) else [*(before[1] if before else []), *where]
            wanted[kind] = (None, places)
    if not wanted:
        raise UsageError("what does it run on? Give --on A100:8, or resources: {accelerators: A100:8}")
    return wanted


def _pools(asked: Asked, accelerator: Accelerator, where: Sequence[Where], table: Sequence[Price]) -> tuple[Price, ...]:
    """From the table, with the prices that were given."""
    spot, on_demand = asked.price_spot, asked.price_on_demand
    if spot is not None and on_demand is not None:
        try:
            like = priced(table, accelerator, where)[0]
        except UsageError:
            like = Price(
                provider="given", region="prices", instance=str(accelerator), accelerator=accelerator.name,
                gpus=accelerator.count, gpu_memory_gib=0.0, on_demand_usd_h=1.0, spot_usd_h=1.0,
                notice_s=30.0 if asked.notice_s is None else asked.notice_s, as_of="given", source="given",
            )  # fmt: skip
        return (_at(like, spot_usd_h=spot, on_demand_usd_h=on_demand),)
    found = priced(table, accelerator, where)
    if spot is None and on_demand is None:
        return found
    given = {name: price for name, price in (("spot_usd_h", spot), ("on_demand_usd_h", on_demand)) if price is not None}
    return tuple(_at(price, **given) for price in found)


def _at(price: Price, **prices: float) -> Price:
    if min(prices.values()) <= 0:
        raise UsageError("a price is more than $0")
    return msgspec.structs.replace(price, as_of="given", source="given", **prices)


def _notes(job: JobFile, measured: Measured | None) -> list[str]:
    notes = [] if measured is None else list(measured.notes)
    if job.spot_policy == "on-demand" or job.resources.use_spot is False:
        notes.append("the job file asks for on-demand only; the plan compares all the same")
    if job.resources.ordered:
        notes.append("the file puts its alternatives in an order; the plan takes the cheapest that fits")
    rules = {key: said for key in _NOT_PLANNED if (said := getattr(job, key))}
    if rules:
        parse_rules(rules, job.num_nodes)
        notes.append(f"the plan does not count with {', '.join(rules)} of the job file")
    return notes
