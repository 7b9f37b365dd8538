"""A comparison as data: one document for programs, and one line per window and policy for spreadsheets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from holdfast.simulate.market.comparing import Comparison, Played, Section
from holdfast.simulate.market.outcome import UNFINISHED

__all__ = ["COLUMNS", "rows_of", "to_json"]

_MONEY = ("microusd", "spot_microusd", "on_demand_microusd", "refund_microusd")
_FIGURES = (
    "useful_s", "lost_s", "changeover_s", "waiting_s", "spot_s", "on_demand_s", "preemptions", "spot_launches",
    "on_demand_launches",
)  # fmt: skip
COLUMNS = (
    "group", "pool", "work_s", "deadline_s", "window", "start_s", "policy", "cost_usd", "spot_usd", "on_demand_usd", "refund_usd",
    "optimum_usd", "late", "finish_s", *_FIGURES,
)  # fmt: skip
"""Of `rows_of`. Windows are numbered from 1, as `--explain` takes them."""


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the tick-by-tick story. Money in dollars, time in seconds."""
    request = comparison.request
    return {
        "policies": list(request.policies),
        "beliefs": request.given.value,
        "every_s": request.every_s,
        "sections": [_section(each) for each in comparison.sections],
    }


def rows_of(comparison: Comparison) -> Iterator[list[object]]:
    """One list per window and policy, in the order of COLUMNS; None where there is nothing to say."""
    for section in comparison.sections:
        for played in section.played:
            for line in section.lines:
                yield from _rows(section, played, line.policy)


def _section(section: Section) -> dict[str, Any]:
    job = section.workload.job
    optimum = None
    if section.optimum_usd is not None:
        band = section.optimum_band_usd
        exact = all(played.optimum_is_exact for played in section.played)
        optimum = {"mean_usd": section.optimum_usd, "band_usd": None if band is None else asdict(band), "exact": exact}
    return {
        "group": section.group,
        "work_s": job.work_s,
        "deadline_s": job.deadline_s,
        "changeover_s": job.changeover_s,
        "max_lost_s": job.max_lost_s,
        "gang": section.workload.gang,
        "asks": section.workload.asks,
        "horizon_s": section.workload.follow_s,
        "free_if_taken_within_s": section.workload.free_if_taken_within_s,
        "independent_blocks": section.blocks,
        "grounds": [_ground(played) for played in section.played],
        "optimum": optimum,
        "policies": [asdict(line) for line in section.lines],
        "windows": [window for played in section.played for window in _windows(section, played)],
    }


def _ground(played: Played) -> dict[str, Any]:
    trace = played.ground.trace
    up = trace.available(played.workload.gang)
    return {
        "name": played.ground.name,
        "pools": list(trace.pools),
        "tick_s": trace.tick_s,
        "ticks": trace.ticks,
        "history_ticks": played.ground.history_ticks,
        "availability": float(up.any(axis=0).mean()),
        "mean_spot_usd_h": float(trace.microusd_h.mean() / 1e6),
        "on_demand_usd_h": trace.on_demand_microusd_h / 1e6,
    }


def _windows(section: Section, played: Played) -> Iterator[dict[str, Any]]:
    names = [line.policy for line in section.lines]
    for number in range(len(played.starts)):
        yield {
            "pool": played.ground.name,
            "window": number + 1,
            "start_s": played.start_s(number),
            "optimum_usd": _optimum_usd(played, number),
            "cost_usd": {name: int(played.outcomes[name].microusd[number]) / 1e6 for name in names},
            "late": [name for name in names if played.outcomes[name].missed[number]],
        }


def _rows(section: Section, played: Played, policy: str) -> Iterator[list[object]]:
    outcomes, job = played.outcomes[policy], section.workload.job
    for number in range(len(played.starts)):
        finish_s = int(outcomes.finish_s[number])
        yield [
            section.group, played.ground.name, job.work_s, job.deadline_s, number + 1, played.start_s(number), policy,
            *(int(getattr(outcomes, name)[number]) / 1e6 for name in _MONEY), _optimum_usd(played, number),
            int(outcomes.missed[number]), None if finish_s == UNFINISHED else finish_s,
            *(int(getattr(outcomes, name)[number]) for name in _FIGURES),
        ]  # fmt: skip


def _optimum_usd(played: Played, window: int) -> float | None:
    return None if played.optimum_microusd is None else int(played.optimum_microusd[window]) / 1e6
