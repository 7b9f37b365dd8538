"""Several pools with migration: what ours costs beside the exact optimum, on published traces with the pools' own prices.

    .venv/bin/python benchmarks/policy_pools.py --traces DIR [--part judge] [--every-h 6] [--save]

DIR holds the two sets of probes as published: `aws_v100_2023` (one CSV per zone, 1 = available, and `spot_prices.json`) and
`gcp_h100_2025` (one JSON per zone, 1 = preempted; prices in the metadata). Each trace is cut in two by time: the first half tunes,
the second one judges. When tuning, windows start after the first quarter (AWS) or the first 15 % (GCP) and the time before is the
history; when judging, the whole first half is. 48 h of work, a deadline 1.1 and 1.5 times as far, changeovers of 0.05 and 0.2 h.

    cold    ours without any history
    shape   ours that has learned from the history how capacity behaves, but not which pool is which
    own     ours with what the history says of each pool

The figure is the mean cost over that of the multi-pool optimum, less one: the optimum knows the future and moves as well. The band
holds 90 % of 2,000 block bootstraps over days. Besides all zones there are sets of few and rough ones, where spot capacity is often
nowhere: those are hard for anybody who does not know the future. `--egress` bills a checkpoint of so many GB at $0.02 (same
continent) or $0.08 for every move between regions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from policy_ours import DAY_S, cut

from holdfast.policy.market.arrays import Floats
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Job
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.optimum import offline_optimum
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.fit import fit_ours
from holdfast.simulate.traces.read import Marks, priced, read_csv, read_json, read_prices
from holdfast.simulate.traces.trace import Trace, joined
from policy import HERE, HOUR_S, ON_DEMAND, SPOT, job

SIMPLE = ("greedy", "uniform-progress", "on-demand")
CASES = ((1.1, 0.05), (1.1, 0.2), (1.5, 0.05), (1.5, 0.2))
HEADLINE = ("V100, 9 zones", "H100, 13 zones")


def aws(folder: Path) -> Trace:
    prices = read_prices(folder / "spot_prices.json")
    zones = [
        read_csv(path, marks=Marks.AVAILABLE, spot=SPOT, on_demand=ON_DEMAND) for path in sorted(folder.glob("*.csv"))
    ]
    return joined([priced(zone, prices) for zone in zones])


def gcp(folder: Path) -> Trace:
    zones: list[Trace] = []
    for path in sorted(folder.glob("*.json")):
        spot = json.loads(path.read_text())["metadata"]["price_info"]["price"]
        zones.append(read_json(path, marks=Marks.TAKEN, spot=spot))
    return joined(zones)


def sets(folder: Path) -> dict[str, Trace]:
    v100, h100 = aws(folder / "aws_v100_2023"), gcp(folder / "gcp_h100_2025")
    rough = [f"us-east-1{zone}_v100_1" for zone in "acdf"]
    return {
        "V100, 9 zones": v100,
        "H100, 13 zones": h100,
        "V100, one zone of three regions": v100.only("us-east-1f_v100_1", "us-east-2b_v100_1", "us-west-2a_v100_1"),
        "V100, us-east-1 (4 zones)": v100.only(*rough),
        "H100, 4 rough zones": h100.only("us-central1-c", "us-east4-b", "us-east5-a", "us-west1-b"),
    }


def region(pool: str) -> str:
    return pool.split("_")[0].rstrip("abcdef").rstrip("-")


def egress(pools: tuple[str, ...], gigabytes: float) -> tuple[tuple[int, ...], ...]:
    if not gigabytes:
        return ()

    def dollars_gb(a: str, b: str) -> float:
        if region(a) == region(b):
            return 0.0
        return 0.02 if a.split("-")[0] == b.split("-")[0] else 0.08

    return tuple(tuple(round(dollars_gb(a, b) * gigabytes * 1e6) for b in pools) for a in pools)


def optimum(trace: Trace, task: Job, start: int, moves: tuple[tuple[int, ...], ...]) -> float:
    best = offline_optimum(
        task, trace.tick_s, trace.available(), trace.microusd_h, trace.on_demand_microusd_h, start, moves
    )
    if best.microusd is None or not best.exact:
        raise AssertionError(f"no exact optimum of {task}")
    return best.microusd / 1e6


def band(costs: Floats, best: Floats, day: Floats) -> list[float]:
    luck = np.random.default_rng(1)
    days = np.unique(day)
    sums = [np.array([each[day == one].sum() for one in days]) for each in (costs, best)]
    drawn = luck.integers(0, len(days), (2000, len(days)))
    over = sums[0][drawn].sum(axis=1) / sums[1][drawn].sum(axis=1) - 1
    return [round(float(each), 4) for each in np.quantile(over, (0.05, 0.95))]


def case(
    name: str, here: Trace, given: dict[str, Ours], ratio: float, changeover_h: float, every_h: float, gigabytes: float
) -> dict[str, Any]:
    task = job(48 * ratio, changeover_h)
    starts = here.starts(task.deadline_s, round(every_h * HOUR_S))
    moves = egress(here.pools, gigabytes)
    workload = Workload(job=task, move_microusd=moves)
    best = np.array([optimum(here, task, start, moves) for start in starts.tolist()])
    day = np.floor(starts * here.tick_s / DAY_S)
    out: dict[str, Any] = {
        "pools": name, "ratio": ratio, "changeover_h": changeover_h, "windows": len(starts),
        "optimum_dollars": round(float(best.mean()), 2), "over": {}, "band": {}, "launches": {}, "missed": 0, "windows_per_s": {},
    }  # fmt: skip
    policies: dict[str, MarketPolicy] = {each: POLICIES[each] for each in SIMPLE}
    policies |= {label: Ours(each.beliefs, past=each.past, egress_microusd=moves) for label, each in given.items()}
    for label, policy in policies.items():
        began_s = time.process_time()
        outcomes = simulate(here, policy, workload, starts)
        out["windows_per_s"][label] = round(len(starts) / max(time.process_time() - began_s, 1e-6), 1)
        costs = outcomes.microusd / 1e6
        if (costs < best - 1e-5).any():
            raise AssertionError(f"{label} was cheaper than the optimum")
        out["missed"] += int(outcomes.missed.sum())
        out["over"][label] = round(float(costs.sum() / best.sum()) - 1, 4)
        out["band"][label] = band(costs, best, day)
        out["launches"][label] = round(float((outcomes.spot_launches + outcomes.on_demand_launches).mean()), 1)
    simple = min(out["over"][each] for each in SIMPLE)
    out["dearer_than_best_simple"] = {label: round((1 + out["over"][label]) / (1 + simple) - 1, 4) for label in given}
    figures = "  ".join(f"{label} {out['over'][label]:+6.1%}" for label in policies)
    low, high = out["band"]["own"]
    print(
        f"{name:32} {ratio} {changeover_h:4} h {len(starts):3} windows ${best.mean():8.2f}  {figures} ({low:.1%} to {high:.1%})",
        flush=True,
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--part", choices=("tune", "judge"), default="judge")
    parser.add_argument("--every-h", type=float, default=6)
    parser.add_argument("--egress", type=float, default=0, metavar="GB")
    parser.add_argument("--only", action="append", help="the name of a set; several times for several")
    parser.add_argument("--save", action="store_true", help="write results/policy-pools-<part>-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, trace in sets(arguments.traces).items():
        if arguments.only and name not in arguments.only:
            continue
        middle = {"judge": 0.5}.get(arguments.part, 0.25 if name.startswith("V") else 0.15)
        history, here = cut(trace, 0, middle), cut(trace, middle, 1.0 if arguments.part == "judge" else 0.5)
        own = fit_ours(history)
        given = {"cold": Ours(), "shape": Ours(own.beliefs), "own": own}
        rows += [case(name, here, given, *each, arguments.every_h, arguments.egress) for each in CASES]
    for label in ("cold", "shape", "own"):
        for kind in HEADLINE:
            over = [row["over"][label] for row in rows if row["pools"] == kind]
            if over:
                print(f"{kind}, {label}: {np.mean(over):+.1%} on average, {max(over):+.1%} at worst")
    if arguments.save:
        result = {
            "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "part": arguments.part, "every_h": arguments.every_h,
            "egress_gb": arguments.egress, "cases": rows,
        }  # fmt: skip
        extra = f"-egress{arguments.egress:.0f}gb" if arguments.egress else ""
        path = HERE / "results" / f"policy-pools-{arguments.part}{extra}-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
