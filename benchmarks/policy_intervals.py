"""Useful share of uptime: what the interval is worth, and what a notice is, on machines whose lifetimes are drawn.

    .venv/bin/python benchmarks/policy_intervals.py [--runs 120] [--seed 1] [--save]
    .venv/bin/python benchmarks/policy_intervals.py --traces DIR [--save]              lifetimes as in published traces

Weibull lifetimes, shapes 0.6 (as measured on spot machines), 0.75 and 1.0 (exponential), means 1, 2 and 5 h; a save costs the
loop δ = 1, 5, 30 or 120 s; start and restore take 1 or 5 min. A run is 48 h of uptime on average. Three kinds of machines, with
the same lifetimes (with `--traces`, for each CSV in DIR as for `policy.py`: the stretches of availability that were seen whole,
up to a tick longer or shorter, drawn with replacement, and a set-up of 1 min):

    none     no notices; a save is durable 10 s after it
    fits     90 % of the preemptions come with a notice of 120 s; the last save takes 10 s
    short    90 % with a notice of 30 s; a save is durable after 60 s, so that the last one does not fit

What is compared:

    young, daly, exact   the formulas, given the true mean lifetime
    with notice          Young's for the true rate of the preemptions without a notice
    hazard-aware         √(2δ / h(age)), given the true distribution
    best fixed           the interval that is best in hindsight, on these very lifetimes
    ours                 `auto_interval`, from nothing known: cost, exposure, preemptions and notices are learnt. Where a notice
                         is to be expected and a save fits, half a preemption of the prior counts as noticed
    ours, handed less    the same, if the cost is forgotten from machine to machine, neither notices nor this machine's age are
                         counted, and 10 min of lost work are a bound that somebody asked for
    ceiling              one save just before the end of each machine, known ahead

Ratios of sums. Bands hold 90 % of 2,000 bootstraps over runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from holdfast.ledger.goodput import Bucket
from holdfast.policy.interval import DEFAULT_MAX_LOST_WORK_S
from holdfast.policy.market.arrays import Floats
from holdfast.policy.preemptions import PreemptionRate
from holdfast.policy.spread import Spread
from holdfast.simulate.traces.fit import runs as stretches
from holdfast.simulate.traces.lifetimes import Lifetimes, Weibull
from holdfast.simulate.traces.read import Marks, read_csv
from holdfast.simulate.uptime.engine import IntervalRule, ceiling_ms, play
from holdfast.simulate.uptime.fates import Conditions, Fates, Observed, draw_fates
from holdfast.simulate.uptime.intervals import (
    Automatic,
    Fixed,
    best_fixed,
    daly,
    exact,
    weibull_aware,
    with_notice,
    young,
)
from policy import ON_DEMAND, SPOT

HERE = Path(__file__).resolve().parent
HOUR_S = 3600
SHAPES, MEANS_H, COSTS_S, SETUPS_S = (0.6, 0.75, 1.0), (1, 2, 5), (1, 5, 30, 120), (60, 300)
KINDS = ("none", "fits", "short")
RUN_H = 48
NOTICE_SHARE = 0.9
LESS = Automatic(
    keeps_cost=False,
    counts_age=False,
    counts_notices=False,
    max_lost_work_s=DEFAULT_MAX_LOST_WORK_S,
    name="ours, handed less",
)


def scene(kind: str, cost_s: float, setup_s: float) -> Conditions:
    commit_s, last_s = (60.0, 60.0) if kind == "short" else (10.0, 10.0)
    return Conditions(save_cost_s=cost_s, commit_s=commit_s, restore_s=setup_s, last_save=Spread(last_s))


def rules(kind: str, conditions: Conditions, lives: Lifetimes, mean_s: float, fates: Fates) -> list[IntervalRule]:
    expected = NOTICE_SHARE if kind == "fits" else 0.0
    noticed = with_notice(conditions, mean_s, expected)
    ours = Automatic(prior=PreemptionRate(prior_noticed=0.5 if kind == "fits" else 0.0), name="ours")
    shared: list[IntervalRule] = [best_fixed(conditions, fates, noticed.interval_s), ours, LESS]
    if kind == "none":
        aware = [weibull_aware(conditions, lives)] if isinstance(lives, Weibull) else []
        return [young(conditions, mean_s), daly(conditions, mean_s), exact(conditions, mean_s), *aware, *shared]
    return [young(conditions, mean_s), noticed, *shared] if kind == "fits" else [young(conditions, mean_s), *shared]


def case(
    lives: Lifetimes, mean_h: float, cost_s: float, setup_s: float, runs: int, seed: int, **labels: object
) -> dict[str, Any]:
    """Useful shares by kind and rule, with their bands, and some differences, in points."""
    useful: dict[str, dict[str, Floats]] = {}
    best_s: dict[str, float] = {}
    for kind in KINDS:
        conditions = scene(kind, cost_s, setup_s)
        fates = draw_fates(
            lives, conditions, runs=runs, machines=max(1, round(RUN_H / mean_h)), seed=seed,
            notice_share=0.0 if kind == "none" else NOTICE_SHARE, notice=120.0 if kind == "fits" else 30.0,
        )  # fmt: skip
        useful[kind] = {"ceiling": ceiling_ms(conditions, fates).sum(axis=1) / 1000}
        for rule in rules(kind, conditions, lives, mean_h * HOUR_S, fates):
            useful[kind][rule.name] = play(rule, conditions, fates).buckets[Bucket.USEFUL].sum(axis=1) / 1000
            if isinstance(rule, Fixed) and rule.name == "best fixed":
                best_s[kind] = round(rule.interval_s, 1)
    uptime_s = fates.life_ms.sum(axis=1) / 1000
    weights = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), 2000)

    def points(plus: Floats, minus: Floats | float = 0.0) -> list[float]:
        """Estimate, 5 % and 95 %."""
        gained = plus - minus
        bands = np.quantile((weights @ gained) / (weights @ uptime_s), (0.05, 0.95))
        return [round(100 * float(each), 2) for each in (gained.sum() / uptime_s.sum(), *bands)]

    none, fits = useful["none"], useful["fits"]
    aware = {}
    if "hazard-aware" in none:
        aware["hazard-aware over young"] = points(none["hazard-aware"], none["young"])
    return {
        **labels, "mean_h": mean_h, "save_cost_s": cost_s, "setup_s": setup_s,
        "best_fixed_s": best_s,
        "useful_percent": {kind: {name: points(each) for name, each in of.items()} for kind, of in useful.items()},
        "points": {
            "best fixed over young": points(none["best fixed"], none["young"]),
            **aware,
            "a notice that fits, ours": points(fits["ours"], none["ours"]),
            "ours against best fixed": {kind: points(of["ours"], of["best fixed"]) for kind, of in useful.items()},
            "handed less against ours": {kind: points(of[LESS.name], of["ours"]) for kind, of in useful.items()},
        },
    }  # fmt: skip


def tell(row: dict[str, Any]) -> None:
    lives = f"shape {row['shape']}" if "shape" in row else row["pool"]
    print(f"{lives}, mean {row['mean_h']:.2f} h, save {row['save_cost_s']} s, set-up {row['setup_s']} s")
    for kind, of in row["useful_percent"].items():
        print(f"  {kind:6}" + "  ".join(f"{name} {each[0]:.1f}" for name, each in of.items()), flush=True)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Lowest, median and highest of the differences, in points, over all cases."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, each in row["points"].items():
            for kind, estimate in each.items() if isinstance(each, dict) else [("", each)]:
                found.setdefault(f"{name} {kind}".strip(), []).append(estimate[0])
    out = {}
    for name, values in found.items():
        out[name] = {"lowest": min(values), "median": round(float(np.median(values)), 2), "highest": max(values)}
        print(f"{name:40} {out[name]['lowest']:+6.2f} {out[name]['median']:+6.2f} {out[name]['highest']:+6.2f}")
    return out


_LINES = (
    ("fits", "ceiling", "ceiling", "#24292f", ":", "none"),
    ("fits", "ours", "ours, a notice that fits", "#1a7f37", "-", "o"),
    ("fits", LESS.name, "the same, handed less", "#7fc48f", "--", "o"),
    ("none", "best fixed", "best fixed, no notice", "#9aa4b2", "-", "s"),
    ("none", "ours", "ours, no notice", "#1f6feb", "-", "o"),
    ("none", "young", "Young, no notice", "#cf222e", "none", "x"),
    ("short", "ours", "ours, a save of 60 s in a notice of 30 s", "#d4a72c", "none", "v"),
)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Shape 0.6, set-up of a minute: one panel per mean lifetime."""
    figure, panels = plt.subplots(1, len(MEANS_H), figsize=(16, 6), sharey=True, layout="constrained")
    for axes, mean_h in zip(panels, MEANS_H, strict=True):
        here = [
            row for row in rows if (row["shape"], row["mean_h"], row["setup_s"]) == (SHAPES[0], mean_h, SETUPS_S[0])
        ]
        _panel(axes, here)
        axes.set_title(f"mean lifetime {mean_h} h")
    panels[0].set_ylabel("useful share of uptime, %")
    panels[0].legend(loc="lower left", fontsize=9)
    figure.suptitle("What the interval is worth, and what a notice is: Weibull lifetimes, shape 0.6, set-up 1 min")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Axes, here: list[dict[str, Any]]) -> None:
    places = np.arange(len(here))
    for kind, name, label, colour, line, marker in _LINES:
        values, low, high = np.array([row["useful_percent"][kind][name] for row in here]).T
        axes.plot(places, values, color=colour, linestyle=line, marker=marker, markersize=6, label=label)
        if name == "ours":
            axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xticks(places, [f"{row['save_cost_s']} s" for row in here])
    axes.set_xlabel("what a save costs the loop")
    axes.grid(axis="y", alpha=0.3)


def weibulls(runs: int, seed: int) -> Iterator[dict[str, Any]]:
    for shape, mean_h, cost_s, setup_s in product(SHAPES, MEANS_H, COSTS_S, SETUPS_S):
        yield case(Weibull(shape, mean_h * HOUR_S), mean_h, cost_s, setup_s, runs, seed, shape=shape)


def traces(folder: Path, runs: int, seed: int) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.csv")):
        trace = read_csv(path, marks=Marks.AVAILABLE, spot=SPOT, on_demand=ON_DEMAND)
        ticks, up, whole = stretches(trace.available()[0])
        # Of whole ticks only, a fixed interval that beats with them would be best.
        seen, luck = np.repeat(ticks[up & whole], 50), np.random.default_rng(seed)
        seen_s = (seen + luck.random(len(seen)) - luck.random(len(seen))) * trace.tick_s
        lives, mean_h = Observed(tuple(seen_s.tolist())), float(seen_s.mean()) / HOUR_S
        for cost_s in COSTS_S[1:]:
            yield case(lives, mean_h, cost_s, SETUPS_S[0], runs, seed, pool=trace.pools[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--save", action="store_true", help="write results/policy-intervals-<cpus>cpu-<date>.json and .png"
    )
    parser.add_argument("--traces", type=Path)
    arguments = parser.parse_args()
    began_s = time.process_time()
    folder, runs, seed = arguments.traces, arguments.runs, arguments.seed
    rows = []
    for row in traces(folder, runs, seed) if folder else weibulls(runs, seed):
        rows.append(row)
        tell(row)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "runs": runs, "seed": seed,
        "run_h": RUN_H, "notice_share": NOTICE_SHARE, "summary": summary(rows), "cases": rows,
        "cpu_s": round(time.process_time() - began_s),
    }  # fmt: skip
    if arguments.save:
        name = "policy-intervals-traces" if folder else "policy-intervals"
        path = HERE / "results" / f"{name}-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        if not folder:
            draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
