"""From the death of a node to the first step of the others: how long does each part take, and which settings decide?

    .venv/bin/python benchmarks/elastic.py [--strikes 5] [--folder DIR] [--save]

Three nodes on this machine (torchrun agents with one worker each, as in tests/ranks/nodes.py), their rendezvous and checkpoints
in a folder. A node is killed as a machine is, every other time that of rank 0; or told to go (SIGTERM to its agent); the others go
on; it is started again. Times are those of the rendezvous' records and of the workers' own notes:

    given up   the others stop counting on it: heartbeats missed, or it has said that it goes
    round      they have formed a round without it
    start      torchrun has started the workers            imports   torch and holdfast are loaded
    group      init_process_group                          restore   the run is claimed, the checkpoint loaded
    step       the first step is done
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "ranks"))

from nodes import STEPS, Cluster, Node  # noqa: E402

SETTINGS = {
    "defaults": "",
    "keep_alive_interval=2,regroup_timeout=2": "keep_alive_interval=2,regroup_timeout=2",
}
PARTS = ("given up", "round", "start", "imports", "group", "restore", "step")


def records(cluster: Cluster) -> list[tuple[float, dict[str, Any]]]:
    """When each version of the rendezvous' state was written, and what it says; oldest first."""
    paths = sorted((cluster.folder / "run" / "rendezvous" / "job").iterdir())
    return [(path.stat().st_mtime, json.loads(path.read_bytes())["page"]["state"]) for path in paths]


def parts_of(cluster: Cluster, struck_s: float, number: int, pid: int) -> dict[str, float]:
    """Seconds of each part, for the round of that number, which is the first after the strike on the agent `pid`."""
    after = [(when_s, state) for when_s, state in records(cluster) if when_s > struck_s]
    old = after[0][1]["round"]
    given_up_s = next(when_s for when_s, state in after if all(node["pid"] != pid for node in state["nodes"]))
    formed_s = next(when_s for when_s, state in after if state["round"] > old and state["complete"])
    events = cluster.rounds()[number][1]
    moments = [struck_s, given_up_s, formed_s]
    for what in ("started", "imported", "joined", "restored", "step"):
        first: dict[int, float] = {}
        for event in events:
            if event["what"] == what:
                first.setdefault(event["rank"], event["unix_s"])
        moments.append(max(first.values()))
    return {part: later - sooner for part, sooner, later in zip(PARTS, moments[:-1], moments[1:], strict=True)}


def measure(folder: Path, conf: str, strikes: int, *, told: bool) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    cluster = Cluster(folder, pace_s=0.4, conf=",".join(filter(None, ["last_call_timeout=5", conf])))
    try:
        for name in "abc":
            cluster.node(name).start()
        before = cluster.until_running(3)
        for number in range(strikes):
            if cluster.progress()[2] > STEPS - 8:
                break
            host = cluster.host()
            victim = host if number % 2 == 0 else next(node for node in cluster.nodes.values() if node is not host)
            pid, struck_s = victim.agent_pid, time.time()
            strike(victim, told=told)
            shrunk = cluster.until_running(2, before)
            parts = parts_of(cluster, struck_s, shrunk, pid)
            found.append({**parts, "in all": sum(parts.values())})
            print("  " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in found[-1].items()), flush=True)
            victim.kill()
            victim.start()
            before = cluster.until_running(3, shrunk)
    finally:
        cluster.end()
    return found


def strike(victim: Node, *, told: bool) -> None:
    if told:
        victim.signal(signal.SIGTERM, agent_only=True)
    else:
        victim.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strikes", type=int, default=5, help="of each kind, under each of the settings")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--save", action="store_true", help="write results/elastic-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    for name, conf in SETTINGS.items():
        for told in (False, True):
            title = f"{'told to go' if told else 'killed'}, {name}"
            print(title, flush=True)
            found: list[dict[str, float]] = []
            while len(found) < arguments.strikes:
                with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
                    found += measure(Path(folder), conf, arguments.strikes - len(found), told=told)
            medians = {part: median(one[part] for one in found) for part in found[0]}
            result[title] = {"strikes": found, "medians": medians}
    print(json.dumps({title: its["medians"] for title, its in result.items() if isinstance(its, dict)}, indent=1))
    if arguments.save:
        path = HERE / "results" / f"elastic-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
