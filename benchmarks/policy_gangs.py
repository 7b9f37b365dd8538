"""Gangs of 4 and 16 nodes in the simulator: elastic against rigid, and what each costs beside on-demand.

    .venv/bin/python benchmarks/policy_gangs.py [--rounds 5]                                   speed, on traces of its own
    .venv/bin/python benchmarks/policy_gangs.py --traces DIR [--part judge] [--save]               and what it costs

DIR holds two folders as published: `aws_nodes_2021` (`milliseconds,add|remove,node`: a spot cluster's nodes, 11 h of p3 and
g4dn) and `aws_v100_2023` (one CSV per zone, `date,availability`, 1 = available). The second says only whether one machine could
be had, so it is thinned: N places per zone that each come and go as measured, with the correlation of two places that is named.
Each zone is a pool by itself. Its first half tunes, its second half judges. The node traces are too short to be cut: they were
looked at while tuning.

Work scales linearly up to N nodes. A launch takes 9 minutes, a restart of the gang 3: together the 0.2 h of the other
benchmarks. On-demand $3.06, spot $0.9731 a node and hour. Deadlines 1.1 and 1.5 times the work: 24 h on all nodes on the
thinned traces, 5 h on the others. Beside it `bound`: every spot node-second there is, then on-demand, and no change costs
anything; nothing can be cheaper. The band holds 90 % of 2,000 bootstraps over days (all zones' windows that start on one day
are drawn together) of the ratio of summed costs to those of the rigid gang under greedy.
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

import numpy as np

from holdfast.policy.market.arrays import Floats, Ints
from holdfast.policy.nodes.facts import Kind, NodeJob
from holdfast.policy.nodes.registry import NODE_POLICIES
from holdfast.simulate.nodes.engine import NodeWorkload, simulate_nodes
from holdfast.simulate.nodes.outcome import NodeOutcomes
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.traces.read import Marks, read_csv, read_node_events
from holdfast.simulate.traces.synthetic import Pool, PriceWalk, generate
from holdfast.simulate.traces.thinned import thinned
from holdfast.simulate.traces.trace import Trace

HERE = Path(__file__).resolve().parent
HOUR_S, DAY_S = 3600, 86400
SPOT, ON_DEMAND = "0.9731", "3.06"
LAUNCH_S, RESTART_S = 540, 180
RIGID = ("rigid-greedy", "rigid-uniform-progress", "rigid-ours")
ELASTIC = ("elastic-greedy", "elastic-uniform-progress", "elastic-thrifty")
NAMES = ("on-demand", *RIGID, *ELASTIC)


def job_for(name: str, nodes: int, work_h: float, ratio: float) -> NodeJob:
    make = NodeJob.rigid if name in RIGID else NodeJob.elastic
    return make(
        nodes=nodes,
        work_s=round(work_h * HOUR_S),
        deadline_s=round(work_h * ratio * HOUR_S),
        launch_s=LAUNCH_S,
        restart_s=RESTART_S,
    )


def bound(trace: Trace, task: NodeJob, starts: Ints) -> Floats:
    """Dollars: all spot node-seconds before the deadline, then on-demand; changes are free. One pool, one price, linear work."""
    ticks = -(-task.deadline_s // trace.tick_s)
    lengths_s = np.minimum(trace.tick_s, task.deadline_s - np.arange(ticks) * trace.tick_s)
    there = np.minimum(trace.capacity[0], task.nodes)
    node_s = np.array([int((there[start : start + ticks] * lengths_s).sum()) for start in starts.tolist()])
    work_node_s = task.full_s * task.nodes
    on_spot_s = np.minimum(node_s, work_node_s)
    spent = on_spot_s * int(trace.microusd_h[0, 0]) + (work_node_s - on_spot_s) * trace.on_demand_microusd_h
    dollars: Floats = spent / HOUR_S / 1e6
    return dollars


def play(trace: Trace, name: str, task: NodeJob, starts: Ints) -> NodeOutcomes:
    outcomes = simulate_nodes(trace, NODE_POLICIES[name], NodeWorkload(job=task), starts)
    if outcomes.missed.any():
        raise AssertionError(f"{name} was late in {trace.pools[0]}")
    return outcomes


def figures(outcomes: list[NodeOutcomes]) -> dict[str, float]:
    """Means over all windows."""

    def mean(name: str) -> float:
        return float(np.concatenate([getattr(each, name) for each in outcomes]).mean())

    return {
        "dollars": round(mean("microusd") / 1e6, 2),
        "misses": int(sum(each.missed.sum() for each in outcomes)),
        "finish_h": round(mean("finish_s") / HOUR_S, 2),
        "goodput": round(mean("useful_node_s") / mean("billed_node_s"), 3),
        "spot_node_h": round(mean("spot_node_s") / HOUR_S, 1),
        "on_demand_node_h": round(mean("on_demand_node_s") / HOUR_S, 1),
        "restarts": round(mean("restarts"), 1),
        "preempted_nodes": round(mean("preemptions"), 1),
    }


def band(costs: Mapping[str, Floats], name: str, day: Ints) -> list[float]:
    luck = np.random.default_rng(1)
    days = np.unique(day)
    by_day = {each: np.array([costs[each][:, day == one].sum() for one in days]) for each in (name, "rigid-greedy")}
    drawn = luck.integers(0, len(days), (2000, len(days)))
    ratios = by_day[name][drawn].sum(axis=1) / by_day["rigid-greedy"][drawn].sum(axis=1)
    return [round(float(each), 3) for each in np.quantile(ratios, (0.05, 0.95))]


def case(label: str, traces: list[Trace], nodes: int, work_h: float, ratio: float, every_h: float) -> dict[str, Any]:
    task = job_for("on-demand", nodes, work_h, ratio)
    shortest = min(traces, key=lambda trace: trace.ticks)
    starts = shortest.starts(task.deadline_s, round(every_h * HOUR_S))
    outcomes = {
        name: [play(trace, name, job_for(name, nodes, work_h, ratio), starts) for trace in traces] for name in NAMES
    }
    rows: dict[str, Any] = {name: figures(each) for name, each in outcomes.items()}
    least = np.concatenate([bound(trace, task, starts) for trace in traces])
    if len(traces) > 1:
        costs = {name: np.vstack([one.microusd / 1e6 for one in each]) for name, each in outcomes.items()}
        day = np.asarray(starts * shortest.tick_s // DAY_S)
        for name in NAMES:
            rows[name]["of_rigid_greedy_90"] = band(costs, name, day)
    for name in NAMES:
        rows[name]["of_on_demand"] = round(rows[name]["dollars"] / rows["on-demand"]["dollars"], 3)
        rows[name]["of_rigid_greedy"] = round(rows[name]["dollars"] / rows["rigid-greedy"]["dollars"], 3)
    out = {
        "where": label, "nodes": nodes, "work_h": work_h, "ratio": ratio, "windows": len(least),
        "bound_dollars": round(float(least.mean()), 2), "policies": rows,
    }  # fmt: skip
    show(out)
    return out


def show(out: dict[str, Any]) -> None:
    print(
        f"{out['where']}, {out['nodes']} nodes, {out['work_h']:g} h of work, deadline x {out['ratio']}, {out['windows']} windows; "
        f"bound ${out['bound_dollars']:.2f}"
    )
    for name, row in out["policies"].items():
        spread = "  ({} to {})".format(*row["of_rigid_greedy_90"]) if "of_rigid_greedy_90" in row else ""
        print(
            f"  {name:25} ${row['dollars']:8.2f}  {row['of_on_demand']:6.1%} of on-demand  {row['misses']} late  "
            f"done at {row['finish_h']:5.2f} h  {row['restarts']:5.1f} restarts  "
            f"{row['of_rigid_greedy']:6.1%} of rigid-greedy{spread}",
            flush=True,
        )


def cases(folder: Path, part: str, every_h: float) -> list[dict[str, Any]]:
    node_traces = [
        read_node_events(
            folder / "aws_nodes_2021" / f"{name}_nodes.csv", pool=name, tick_s=60, spot=SPOT, on_demand=ON_DEMAND
        )
        for name in ("p3", "g4dn")
    ]
    zones = [
        half(read_csv(path, marks=Marks.AVAILABLE, spot=SPOT, on_demand=ON_DEMAND), part)
        for path in sorted((folder / "aws_v100_2023").glob("*.csv"))
    ]
    rows: list[dict[str, Any]] = []
    for nodes in (4, 16):
        for ratio in (1.1, 1.5):
            for trace in node_traces:
                rows.append(case(f"nodes of {trace.pools[0]}", [trace], nodes, 5, ratio, 1 / 6))
            for correlation in (0.0, 0.3, 1.0):
                thin = [thinned(zone, nodes, seed=number, correlation=correlation) for number, zone in enumerate(zones)]
                rows.append(case(f"V100 thinned, correlation {correlation}", thin, nodes, 24, ratio, every_h))
    return rows


def half(trace: Trace, part: str) -> Trace:
    middle = trace.ticks // 2
    ticks = slice(0, middle) if part == "tune" else slice(middle, None)
    return replace(trace, capacity=trace.capacity[:, ticks], microusd_h=trace.microusd_h[:, ticks])


def speed(rounds: int) -> list[dict[str, Any]]:
    """Windows of 48 hours that one core plays in a second: 32 h of work of all nodes, probes every 195 s. CPU time."""
    pool = Pool(
        name="pool",
        up=Weibull(0.7, 4 * HOUR_S),
        down=Weibull(0.8, 2 * HOUR_S),
        price=PriceWalk(mean_microusd_h=973_100),
    )
    one = generate([pool], tick_s=195, duration_s=45 * DAY_S, on_demand_microusd_h=3_060_000, seed=1)
    rows: list[dict[str, Any]] = []
    for nodes in (4, 16):
        trace = thinned(one, nodes, seed=1, correlation=0.3)
        sweep = NodeJob.divisible(
            nodes=nodes, items=32 * nodes, item_s=HOUR_S, deadline_s=48 * HOUR_S, launch_s=LAUNCH_S, restart_s=RESTART_S
        )
        tasks = {name: job_for(name, nodes, 32, 1.5) for name in NAMES} | {"elastic-thrifty, items of 1 h": sweep}
        starts = trace.starts(48 * HOUR_S, 2 * HOUR_S)
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for turn in range(rounds + 1):
            order = [*tasks][turn % len(tasks) :] + [*tasks][: turn % len(tasks)]
            for name in order:
                began_s = time.process_time()
                simulate_nodes(trace, NODE_POLICIES[name.split(",")[0]], NodeWorkload(job=tasks[name]), starts)
                if turn:
                    seconds[name].append((time.process_time() - began_s) / len(starts))
        for name, each in seconds.items():
            rows.append(
                {
                    "nodes": nodes,
                    "kind": (Kind.DIVISIBLE if "," in name else tasks[name].kind).name.lower(),
                    "policy": name,
                    "windows": len(starts),
                    "windows_per_s": round(1 / median(each), 1),
                    "lowest": round(1 / max(each), 1),
                    "highest": round(1 / min(each), 1),
                }
            )
            print(
                "{nodes:2} nodes, {policy:30} {windows_per_s:7.0f} windows/s ({lowest:.0f} to {highest:.0f})".format(
                    **rows[-1]
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--part", choices=("tune", "judge"), default="judge")
    parser.add_argument("--every-h", type=float, default=12)
    parser.add_argument("--save", action="store_true", help="write results/policy-gangs-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "launch_s": LAUNCH_S, "restart_s": RESTART_S,
    }  # fmt: skip
    if arguments.rounds:
        result["speed"] = speed(arguments.rounds)
    if arguments.traces is not None:
        result |= {"part": arguments.part, "every_h": arguments.every_h}
        result["cases"] = cases(arguments.traces, arguments.part, arguments.every_h)
    if arguments.save:
        path = HERE / "results" / f"policy-gangs-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
