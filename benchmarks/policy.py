"""Market policies in the simulator: how fast it is, and how much of the way from greedy to the optimum Uniform Progress goes.

    .venv/bin/python benchmarks/policy.py [--rounds 5] [--save]                                    speed, on traces of its own
    .venv/bin/python benchmarks/policy.py --traces DIR [--every-h 24] [--changeover-h 0.2] [--save]   and the published baseline

DIR holds one CSV per pool (`date,availability`, 1 = available) and `spot_prices.json`, as published with the AWS V100
measurements of 2023. 48 h of work; on-demand $3.06; spot $0.9731, or the traces' own prices. A window starts every so many
hours, in every pool by itself ("each pool"), and in all pools together ("any pool"). The share is a ratio of summed costs:
(greedy - policy) / (greedy - optimum). Beside it the same share of a looser bound, whose changeover is rounded down to whole
ticks: what a dynamic program over whole ticks would give.

CPU time of one core counts for speed. The order of the contestants rotates from round to round, and the first round is thrown
away.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from holdfast.policy.market.facts import Job
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.optimum import offline_optimum
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.traces.read import Marks, priced, read_csv, read_prices
from holdfast.simulate.traces.synthetic import Pool, PriceWalk, generate
from holdfast.simulate.traces.trace import Trace, joined

HERE = Path(__file__).resolve().parent
HOUR_S = 3600
SPOT, ON_DEMAND = "0.9731", "3.06"
BASELINE = ("greedy", "uniform-progress", "uniform-progress-as-written", "on-demand")


def job(deadline_h: float, changeover_h: float) -> Job:
    return Job(work_s=48 * HOUR_S, deadline_s=round(deadline_h * HOUR_S), changeover_s=round(changeover_h * HOUR_S))


def speed(rounds: int) -> list[dict[str, Any]]:
    """Windows of 48 hours that one core plays in a second: 40 h of work in 48, probes every 195 s and every 600 s."""
    rows: list[dict[str, Any]] = []
    task = Job(work_s=40 * HOUR_S, deadline_s=48 * HOUR_S, changeover_s=720)
    for tick_s, pools in ((195, 1), (195, 9), (600, 1)):
        trace = generate(
            [
                Pool(
                    name=f"pool-{number}",
                    up=Weibull(0.7, 4 * HOUR_S),
                    down=Weibull(0.8, 2 * HOUR_S),
                    price=PriceWalk(mean_microusd_h=973_100, spread=0.1),
                )
                for number in range(pools)
            ],
            tick_s=tick_s,
            duration_s=45 * 24 * HOUR_S,
            on_demand_microusd_h=3_060_000,
            seed=1,
        )
        starts = trace.starts(task.deadline_s, 1800)
        seconds: dict[str, list[float]] = {name: [] for name in [*POLICIES, "optimum"]}
        for turn in range(rounds + 1):
            order = [*seconds][turn % len(seconds) :] + [*seconds][: turn % len(seconds)]
            for name in order:
                began_s = time.process_time()
                if name == "optimum":
                    count = 10
                    for start in starts[:count].tolist():
                        bound(trace, task, start)
                else:
                    count = len(starts)
                    simulate(trace, POLICIES[name], Workload(job=task), starts)
                if turn:
                    seconds[name].append((time.process_time() - began_s) / count)
        for name, each in seconds.items():
            rows.append(
                {
                    "tick_s": tick_s,
                    "pools": pools,
                    "policy": name,
                    "windows_per_s": round(1 / median(each), 1),
                    "lowest": round(1 / max(each), 1),
                    "highest": round(1 / min(each), 1),
                }
            )
            line = "{tick_s:4} s ticks, {pools} pools, {policy:28} {windows_per_s:9.0f} windows/s ({lowest:.0f} to {highest:.0f})"
            print(line.format(**rows[-1]))
    return rows


def bound(trace: Trace, task: Job, start: int) -> int:
    best = offline_optimum(task, trace.tick_s, trace.available(), trace.microusd_h, trace.on_demand_microusd_h, start)
    if best.microusd is None or not best.exact:
        raise AssertionError(f"no exact optimum of {task}")
    return best.microusd


def costs(trace: Trace, task: Job, every_s: int) -> dict[str, float]:
    """Dollars over all windows, by policy; `windows` counts them."""
    starts = trace.starts(task.deadline_s, every_s)
    summed: dict[str, float] = {"windows": len(starts)}
    for name in BASELINE:
        outcomes = simulate(trace, POLICIES[name], Workload(job=task), starts)
        if outcomes.missed.any():
            raise AssertionError(f"{name} was late")
        summed[name] = float(outcomes.microusd.sum()) / 1e6
    looser = replace(task, changeover_s=task.changeover_s // trace.tick_s * trace.tick_s)
    summed["optimum"] = sum(bound(trace, task, start) for start in starts.tolist()) / 1e6
    summed["whole ticks"] = sum(bound(trace, looser, start) for start in starts.tolist()) / 1e6
    return summed


def row(prices: str, where: str, task: Job, summed: Mapping[str, float]) -> dict[str, Any]:
    windows, gap = summed["windows"], summed["greedy"] - summed["optimum"]
    out: dict[str, Any] = {
        "prices": prices, "where": where, "deadline_h": task.deadline_s / HOUR_S, "changeover_h": task.changeover_s / HOUR_S,
        "windows": int(windows),
        "dollars": {name: round(summed[name] / windows, 2) for name in [*BASELINE, "optimum"]},
        "share": {name: round((summed["greedy"] - summed[name]) / gap, 3) for name in BASELINE[1:3]},
        "share_whole_ticks": round(
            (summed["greedy"] - summed["uniform-progress"]) / (summed["greedy"] - summed["whole ticks"]), 3
        ),
    }  # fmt: skip
    figures = "  ".join(f"{value:7.2f}" for value in out["dollars"].values())
    shares = "  ".join(f"{value:6.1%}" for value in (*out["share"].values(), out["share_whole_ticks"]))
    print(
        f"{prices:5} {where:16} {out['deadline_h']:3.0f} h {out['changeover_h']:5.2f} h  {figures}  {shares}",
        flush=True,
    )
    return out


def baseline(folder: Path, every_h: float, deadlines: list[float], changeovers: list[float]) -> list[dict[str, Any]]:
    flat = [
        read_csv(path, marks=Marks.AVAILABLE, spot=SPOT, on_demand=ON_DEMAND) for path in sorted(folder.glob("*.csv"))
    ]
    own = read_prices(folder / "spot_prices.json")
    print(
        "prices, where, deadline, changeover; dollars: "
        + ", ".join([*BASELINE, "optimum"])
        + "; shares: code, text, code by ticks"
    )
    rows: list[dict[str, Any]] = []
    for prices, traces in (("flat", flat), ("own", [priced(trace, own) for trace in flat])):
        for deadline_h in deadlines:
            for changeover_h in changeovers:
                task = job(deadline_h, changeover_h)
                total: dict[str, float] = {}
                for trace in traces:
                    each = costs(trace, task, round(every_h * HOUR_S))
                    total = {name: total.get(name, 0) + value for name, value in each.items()}
                    rows.append(row(prices, trace.pools[0], task, each))
                rows.append(row(prices, "each pool", task, total))
                rows.append(row(prices, "any pool", task, costs(joined(traces), task, round(every_h * HOUR_S))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--every-h", type=float, default=24)
    parser.add_argument("--deadline-h", type=float, action="append")
    parser.add_argument("--changeover-h", type=float, action="append")
    parser.add_argument("--save", action="store_true", help="write results/policy-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count()}
    if arguments.rounds:
        result["speed"] = speed(arguments.rounds)
    if arguments.traces is not None:
        deadlines, changeovers = arguments.deadline_h or [52, 60, 70], arguments.changeover_h or [0.05, 0.2]
        result["every_h"] = arguments.every_h
        result["baseline"] = baseline(arguments.traces, arguments.every_h, deadlines, changeovers)
    if arguments.save:
        path = HERE / "results" / f"policy-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
