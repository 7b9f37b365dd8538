"""One controller and very many runs: what a minute costs in CPU and requests, how long a start takes, how soon a loss is answered.

    .venv/bin/python benchmarks/fleet_scale.py [--runs 100 300 1000 3000] [--rounds 5] [--save]

Runs work on one machine each; the stores are in memory and the provider is imagined, so figures of CPU are the controller's own,
without any network client's. `steady`: a minute in which nothing happens, after some in which nothing has happened; S3's price of
its requests in us-east-1. `start`: until every run has been looked at, without an index and with one. `mass`: a tenth of all
machines has a notice in the same moment; from then until the last create call is sent, in real time and with the real threads, when
each request to the store takes 30 ms and each create call 2 s.

Time passes by itself in `mass` only; elsewhere it is told to. The order of sizes rotates from round to round, and the first
round is thrown away; medians, least and most.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from fleet_scale_world import Fleet, usd_a_day, while_counting

from holdfast.core.clock import SystemClock
from holdfast.fleet.crew import run_fleet
from holdfast.fleet.index import Index
from holdfast.fleet.pace import FleetPace
from holdfast.testing.clock import ManualClock

HERE = Path(__file__).resolve().parent
DATE = "2026-11-22"
STORE_S, CREATE_S, THREADS = 0.03, 2.0, 16
GIVE_UP_S = 600.0


def minute(fleet: Any, clock: ManualClock, seconds: int = 60) -> None:
    for _ in range(seconds):
        clock.advance(1)
        fleet.turn()


def quiet(runs: int, folder: Path) -> dict[str, Any]:
    """A start, with and without an index, and a steady minute."""
    clock = ManualClock()
    world = Fleet(runs, clock)
    index = Index(folder / f"{runs}.sqlite")
    fleet = world.controller(index)
    minute(fleet, clock, 5)
    assert len(world.provider.there) == runs, world.said[-3:]
    world.everybody_works()
    world.aged(300)
    minute(fleet, clock, 400)
    assert not fleet.counts["failures"], world.said
    round_s = FleetPace().round_s(runs)
    before = fleet.counts["steps"]
    asked = dict(world.provider.asked)
    # As many whole rounds as make a minute or more: each run has had the same number of turns.
    span_s = round(round_s * max(1, -(-60 // round_s)))
    requests, cpu_s = while_counting(world.counts, lambda: minute(fleet, clock, span_s))
    a_minute = {kind: count * 60 / span_s for kind, count in requests.items()}
    steps = (fleet.counts["steps"] - before) * 60 / span_s
    calls = {kind: (count - asked.get(kind, 0)) * 60 / span_s for kind, count in world.provider.asked.items()}
    fleet.leave()
    index.close()
    starts = {}
    for name in ("without index", "with index"):
        kept = Index(folder / f"{runs}.sqlite") if name == "with index" else None
        again = world.controller(kept)
        asked_for, took_s = while_counting(world.counts, again.turn)
        starts[name] = {"requests": asked_for, "cpu_s": took_s}
        again.leave()
        if kept is not None:
            kept.close()
    return {
        "runs": runs, "steady": {"cpu_s_a_minute": cpu_s * 60 / span_s, "steps_a_minute": steps, "requests_a_minute": a_minute,
        "usd_a_day": usd_a_day(a_minute), "provider_calls_a_minute": calls, "round_s": round_s}, "start": starts,
    }  # fmt: skip


def mass(runs: int, folder: Path, latency: bool) -> dict[str, Any]:
    """Seconds from the moment in which a tenth has a notice until create calls are sent."""
    clock = SystemClock()
    world = Fleet(runs, clock)
    index = Index(folder / f"mass-{runs}-{latency}.sqlite")
    first = world.controller(index)
    first.turn()
    first.turn()
    world.everybody_works()
    world.aged(300)
    first.leave()
    fleet, stopped = world.controller(index), threading.Event()
    pace = FleetPace()
    thread = threading.Thread(
        target=run_fleet,
        args=(fleet, stopped.is_set),
        kwargs={"pace": pace, "say": world.said.append, "workers": THREADS},
    )
    thread.start()
    until(lambda: fleet.counts["adopted"] >= runs and fleet.counts["steps"] >= 2 * runs)
    time.sleep(2.0)
    world.provider.created_at_s.clear()
    # Machines speak at their own expense: only what the controller asks takes its time.
    began_s = time.monotonic()
    count = world.taken(0.1)
    told_s = time.monotonic() - began_s
    if latency:
        world.latency_s[0], world.provider.call_s = STORE_S, CREATE_S
    until(lambda: len(world.provider.created_at_s) >= count)
    called = sorted(each - began_s for each in world.provider.created_at_s)
    world.latency_s[0] = world.provider.call_s = 0.0
    stopped.set()
    thread.join()
    fleet.leave()
    index.close()
    assert len(called) == count, (len(called), count, world.said[-3:])
    return {"notices": count, "told_s": told_s, "first_s": called[0], "median_s": median(called), "last_s": called[-1]}


def until(what: Any) -> None:
    give_up_s = time.monotonic() + GIVE_UP_S
    while not what():
        assert time.monotonic() < give_up_s, "waited in vain"
        time.sleep(0.01)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 4), "least": round(min(values), 4), "most": round(max(values), 4)}


def measured(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    found: dict[int, list[dict[str, Any]]] = {runs: [] for runs in sizes}
    for turn in range(rounds + 1):
        for runs in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
            with tempfile.TemporaryDirectory() as folder:
                row = quiet(runs, Path(folder))
                row["mass"] = mass(runs, Path(folder), latency=True)
                row["mass, local"] = mass(runs, Path(folder), latency=False)
            gc.collect()
            if turn or not rounds:
                found[runs].append(row)
    return [summary(rows) for rows in found.values()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    steady = {**first["steady"], "cpu_s_a_minute": spread([row["steady"]["cpu_s_a_minute"] for row in rows])}
    start = {
        name: {
            "requests": first["start"][name]["requests"],
            "cpu_s": spread([row["start"][name]["cpu_s"] for row in rows]),
        }
        for name in first["start"]
    }
    masses = {
        name: {
            "notices": first[name]["notices"],
            **{what: spread([row[name][what] for row in rows]) for what in ("first_s", "median_s", "last_s")},
        }
        for name in ("mass", "mass, local")
    }
    return {"runs": first["runs"], "rounds": len(rows), "steady": steady, "start": start, **masses}


def table(rows: list[dict[str, Any]]) -> str:
    names = (
        "runs",
        "CPU a minute",
        "list / get / put a minute",
        "S3 a day",
        "start: requests, without / with index",
        "CPU",
    )
    lines = [f"| {' | '.join((*names, 'last of 10 % created'))} |", "|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        steady, start = row["steady"], row["start"]
        asked = " / ".join(f"{steady['requests_a_minute'][kind]:,.0f}" for kind in ("list", "get", "put"))
        starts = [start[name] for name in ("without index", "with index")]
        requests = " / ".join(f"{sum(each['requests'].values()):,}" for each in starts)
        cpu = " / ".join(f"{each['cpu_s']['median']:.2f} s" for each in starts)
        lines.append(
            f"| {row['runs']:,} | {steady['cpu_s_a_minute']['median']:.2f} s | {asked} | ${steady['usd_a_day']:.2f} | {requests} | "
            f"{cpu} | {row['mass']['last_s']['median']:.1f} s of {row['mass']['notices']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--rounds", type=int, default=5, help="0: one, and none is thrown away")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/")
    options = parser.parse_args()
    rows = measured(options.runs, options.rounds)
    print(table(rows))
    facts = {
        "date": DATE, "cpus": os.cpu_count(), "store_s": STORE_S, "create_s": CREATE_S, "threads": THREADS, "sizes": rows
    }  # fmt: skip
    if options.save:
        path = HERE / "results" / f"fleet-scale-{os.cpu_count()}cpu-{DATE}.json"
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
