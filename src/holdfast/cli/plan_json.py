"""A plan as JSON: rounded to what it can know, and labelled so that nobody takes it for a quote."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.simulate.planner.montecarlo import Band, Option
    from holdfast.simulate.planner.plan import Plan
    from holdfast.simulate.planner.sensitivity import End
    from holdfast.simulate.planner.verdict import Obstacle

__all__ = ["LABEL", "plain", "rounded"]

LABEL = "orientation"
_DIGITS = 4


def rounded(value: float | None) -> float | None:
    """To four digits; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def plain(made: Plan) -> dict[str, Any]:
    """The keys are those of the command's help."""
    from holdfast.simulate.planner.plan import NOT_MODELLED

    verdict, terms, even, assumed = made.verdict, made.setting.terms, made.even, made.setting.assumed
    return {
        "label": LABEL,
        "name": made.case.name,
        "verdict": {
            "worth": verdict.worth, "headline": verdict.headline, "because": _obstacles(verdict.because),
            "cautions": _obstacles(verdict.cautions), "on_demand_usd": rounded(verdict.on_demand_usd),
            "saved_usd": rounded(verdict.saved_usd), "engineering_usd": rounded(verdict.engineering_usd),
            "net_usd": rounded(verdict.net_usd), "runs_to_pay": rounded(verdict.runs_to_pay),
        },
        "recommended": None if made.best is None else _option(made.best),
        "options": [_option(option) for option in made.options],
        "interval": None if terms.interval is None else {
            "every_s": rounded(terms.interval.interval_s), "reasons": list(terms.interval.reasons)
        },
        "notice": None if terms.notice is None else {
            field.name: _number(getattr(terms.notice, field.name)) for field in fields(terms.notice)
        },
        "break_even": None if even is None else {
            field.name: _number(getattr(even, field.name)) for field in fields(even)
        },
        "figures": {
            field.name: {
                "likely": rounded(figure.likely), "low": rounded(figure.low), "high": rounded(figure.high),
                "origin": figure.origin.value, "note": figure.note,
            }
            for field in fields(assumed)
            for figure in [getattr(assumed, field.name)]
        },
        "prices": [
            {"pool": pool.pool, "on_demand_usd_h": pool.on_demand_usd_h, "spot_usd_h": pool.spot_usd_h, "as_of": pool.as_of,
             "source": pool.source}
            for hardware in made.case.hardware for pool in hardware.pools
        ],
        "sensitivity": {
            "base_usd": rounded(made.base_usd),
            "levers": [
                {"name": lever.name, "likely": rounded(lever.likely), "low": _end(lever.low), "high": _end(lever.high)}
                for lever in made.levers
            ],
        },
        "pilot": None if made.pilot is None else {
            "pool": made.pilot.pool, "first_s": rounded(made.pilot.first_s), "first_usd": rounded(made.pilot.first_usd),
            "hazard_s": rounded(made.pilot.hazard_s), "hazard_usd": rounded(made.pilot.hazard_usd),
            "trials": [
                {"what": trial.what, "count": trial.count, "of": trial.of, "instance_s": rounded(trial.instance_s),
                 "how": trial.how}
                for trial in made.pilot.trials
            ],
        },
        "checklist": [{"state": point.state.value, "what": point.what, "says": point.says} for point in made.points],
        "not_modelled": list(NOT_MODELLED),
        "notes": list(made.notes),
        "samples": made.sampling.samples,
        "seed": made.sampling.seed,
        "meets": made.meets(),
    }  # fmt: skip


def _number(value: object) -> object:
    return value if isinstance(value, bool) or not isinstance(value, float) else rounded(value)


def _obstacles(these: tuple[Obstacle, ...]) -> list[dict[str, str]]:
    return [{"kind": each.kind.value, "says": each.says} for each in these]


def _band(band: Band) -> dict[str, object]:
    return {
        "mean": rounded(band.mean), "p5": rounded(band.low), "p50": rounded(band.middle), "p95": rounded(band.high),
        "curve": [rounded(value) for value in band.curve],
    }  # fmt: skip


def _option(option: Option) -> dict[str, object]:
    return {
        "hardware": option.hardware, "mix": option.mix, "pools": list(option.pools), "cost_usd": _band(option.cost_usd),
        "finish_s": _band(option.finish_s), "p_finished": rounded(option.p_finished), "p_deadline": rounded(option.p_deadline),
        "p_budget": rounded(option.p_budget), "p_both": rounded(option.p_both), "saving": rounded(option.saving),
        "spot_share": rounded(option.spot_share), "preemptions": rounded(option.preemptions), "lost_s": rounded(option.lost_s),
        "waiting_s": rounded(option.waiting_s), "keeps_deadline": option.keeps_deadline,
    }  # fmt: skip


def _end(end: End) -> dict[str, object]:
    return {
        "value": rounded(end.value), "cost_usd": rounded(end.cost_usd), "p_deadline": rounded(end.p_deadline),
        "p_budget": rounded(end.p_budget),
    }  # fmt: skip
