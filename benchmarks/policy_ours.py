"""Ours on published traces: how much of the way from greedy to the optimum it goes, by what it was given to learn from.

    .venv/bin/python benchmarks/policy_ours.py --traces DIR [--part judge] [--every-h 12] [--save]

DIR as for `policy.py`. Each trace is cut in two by time. The first half tunes: its own first half is the history, windows start
in its second half. The second half judges, with the whole first half as history. What `ours` is given:

    own        the history of the same pool
    others     the histories of all other pools, and not this one's
    cold       nothing: the shipped prior
    hindsight  the very part that the windows lie in; not to be had, and a mark of what there is to learn

48 h of work, $3.06 on-demand, $0.9731 spot. The share is a ratio of summed costs: (greedy - policy) / (greedy - optimum). The
band holds 90 % of 2,000 block bootstraps: days are drawn with all pools' windows that start on them, because windows that
overlap and pools of one cloud are not independent. Beside it, for each pool, how much dearer than the cheapest of greedy,
Uniform Progress and on-demand.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.policy.market.arrays import Floats
from holdfast.policy.market.beliefs import COLD, Beliefs
from holdfast.policy.market.facts import Job
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.market.tables import solve
from holdfast.simulate.market.bands import DAY_S, Days
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.fit import fit_beliefs
from holdfast.simulate.traces.read import Marks, read_csv
from holdfast.simulate.traces.trace import Trace, joined
from policy import HERE, HOUR_S, ON_DEMAND, SPOT, bound, job

CASES = ((60, 0.2), (60, 0.05), (52, 0.2))
SIMPLE = ("greedy", "uniform-progress", "on-demand")
GIVEN = ("own", "others", "cold", "hindsight")


def cut(trace: Trace, begin: float, end: float) -> Trace:
    """A stretch of a trace, by shares of its length."""
    ticks = slice(round(begin * trace.ticks), round(end * trace.ticks))
    return replace(trace, capacity=trace.capacity[:, ticks], microusd_h=trace.microusd_h[:, ticks])


def beliefs_of(given: str, pool: int, histories: list[Trace], here: Trace) -> Beliefs:
    if given == "cold":
        return COLD
    if given == "hindsight":
        return fit_beliefs(here)
    if given == "own":
        return fit_beliefs(histories[pool])
    return fit_beliefs(joined([history for number, history in enumerate(histories) if number != pool]))


def play(trace: Trace, policy: Any, task: Job, every_h: float) -> Floats:
    outcomes = simulate(trace, policy, Workload(job=task), trace.starts(task.deadline_s, round(every_h * HOUR_S)))
    if outcomes.missed.any():
        raise AssertionError(f"{policy.name} was late in {trace.pools[0]}")
    return outcomes.microusd / 1e6


def band(costs: dict[str, Floats], policy: str, day: Floats) -> list[float]:
    """Costs are pool x window."""
    days = Days.of(day)
    greedy, optimum = days.sums(costs["greedy"]), days.sums(costs["optimum"])
    found = days.ratio(greedy - days.sums(costs[policy]), greedy - optimum)
    if found is None:
        raise AssertionError("too few days for a band")
    return [round(found.low, 3), round(found.high, 3)]


def case(task: Job, pieces: list[Trace], histories: list[Trace], every_h: float) -> dict[str, Any]:
    names = (*SIMPLE, *GIVEN)
    each: dict[str, list[Floats]] = {name: [] for name in (*names, "optimum")}
    for pool, here in enumerate(pieces):
        starts = here.starts(task.deadline_s, round(every_h * HOUR_S))
        for name in SIMPLE:
            each[name].append(play(here, POLICIES[name], task, every_h))
        for given in GIVEN:
            each[given].append(play(here, Ours(beliefs_of(given, pool, histories, here)), task, every_h))
        each["optimum"].append(np.array([bound(here, task, start) for start in starts.tolist()]) / 1e6)
    costs = {name: np.vstack(rows) for name, rows in each.items()}
    day = np.floor(np.arange(costs["greedy"].shape[1]) * every_h * HOUR_S / DAY_S)
    gap = float((costs["greedy"] - costs["optimum"]).sum())
    shares = {name: round(float((costs["greedy"] - costs[name]).sum()) / gap, 3) for name in names[1:]}
    best = np.min([costs[name].sum(axis=1) for name in SIMPLE], axis=0)
    dearer = {given: np.round(costs[given].sum(axis=1) / best - 1, 4).tolist() for given in GIVEN}
    out: dict[str, Any] = {
        "deadline_h": task.deadline_s / HOUR_S, "changeover_h": task.changeover_s / HOUR_S, "windows": costs["greedy"].size,
        "dollars": {name: round(float(rows.mean()), 2) for name, rows in costs.items()},
        "share": shares, "band": {name: band(costs, name, day) for name in ("uniform-progress", *GIVEN)},
        "dearer_than_best_simple": dict(zip((piece.pools[0] for piece in pieces), zip(*dearer.values(), strict=True), strict=True)),
    }  # fmt: skip
    print(f"{out['deadline_h']:.0f} h, {out['changeover_h']:.2f} h, {out['windows']} windows")
    for name in ("uniform-progress", *GIVEN):
        low, high = out["band"][name]
        worst = f"  worst pool {max(dearer[name]):+.1%}" if name in dearer else ""
        print(
            f"  {name:17} ${out['dollars'][name]:7.2f}  {shares[name]:6.1%}  ({low:.0%} to {high:.0%}){worst}",
            flush=True,
        )
    return out


def speed(trace: Trace) -> dict[str, float]:
    """Windows a second of one core, and what it takes to solve a table. CPU time."""
    task = Job(work_s=40 * HOUR_S, deadline_s=48 * HOUR_S, changeover_s=720)
    starts = np.repeat(trace.starts(task.deadline_s, 6 * HOUR_S), 8)
    solve.cache_clear()
    began_s = time.process_time()
    simulate(trace, Ours(), Workload(job=task), starts[:1])
    first_s = time.process_time() - began_s
    simulate(trace, Ours(), Workload(job=task), starts)
    rates: list[float] = []
    for _ in range(5):
        began_s = time.process_time()
        simulate(trace, Ours(), Workload(job=task), starts)
        rates.append(len(starts) / (time.process_time() - began_s))
    out = {
        "windows_per_s": round(float(np.median(rates)), 1),
        "lowest": round(min(rates), 1),
        "first_window_s": round(first_s, 2),
    }
    print(f"{out['windows_per_s']:.0f} windows/s (lowest {out['lowest']:.0f}); tables and first window {first_s:.1f} s")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--part", choices=("tune", "judge"), default="judge")
    parser.add_argument("--every-h", type=float, default=12)
    parser.add_argument("--save", action="store_true", help="write results/policy-ours-<part>-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    paths = sorted(arguments.traces.glob("*.csv"))
    traces = [read_csv(path, marks=Marks.AVAILABLE, spot=SPOT, on_demand=ON_DEMAND) for path in paths]
    begin, middle, end = (0.0, 0.25, 0.5) if arguments.part == "tune" else (0.0, 0.5, 1.0)
    pieces = [cut(trace, middle, end) for trace in traces]
    histories = [cut(trace, begin, middle) for trace in traces]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "part": arguments.part, "every_h": arguments.every_h,
        "cases": [case(job(*each), pieces, histories, arguments.every_h) for each in CASES],
        "speed": speed(pieces[0]),
    }  # fmt: skip
    if arguments.save:
        path = HERE / "results" / f"policy-ours-{arguments.part}-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
