"""A training on the rehearsal cloud under a real trace, beside its forecast: cost, time, preemptions, and what a crash takes.

    python benchmarks/rehearsal.py --trace zone-a.csv --trace zone-b.csv --marks available --from 1222000 --speed 65 [--json FILE]

Everything is real but the market: `holdfast launch`, its controller (killed again and again, and once suspended), machines as
processes, the store an S3 server behind a slow line, the notices, the bill. Capacity follows the traces, whose time is compressed
(`speed`); boots, imports, notices and money are not. Some preemptions come without a notice.

    reference   the same training alone, on the same store: how much work it is, and its weights
    forecast    the same policy in the simulator on the same compressed trace, with that work and the named changeover
    rehearsal   from `holdfast launch` to the last invoice

It ends with an error unless the weights are the same bits, the books are the provider's invoice, deadline and budget are kept.
"""

# mypy: ignore-errors
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from slow_line import slow_line

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fleet"))

from rehearsing import IMPATIENT, Rehearsal  # noqa: E402

from holdfast.core.clock import SystemClock  # noqa: E402
from holdfast.core.config import parse_bytes, parse_duration_s  # noqa: E402
from holdfast.core.ids import random_token  # noqa: E402
from holdfast.fleet.records import RunRecords  # noqa: E402
from holdfast.fleet.view import RunView, see  # noqa: E402
from holdfast.ledger.read import read_events  # noqa: E402
from holdfast.policy.market.facts import Job  # noqa: E402
from holdfast.policy.market.registry import policy_named  # noqa: E402
from holdfast.simulate.market.engine import simulate  # noqa: E402
from holdfast.simulate.market.workload import Workload  # noqa: E402
from holdfast.simulate.traces.trace import Trace  # noqa: E402
from holdfast.store.open import open_store  # noqa: E402
from holdfast.testing.cloud.config import CloudConfig, PoolConfig, TraceConfig  # noqa: E402
from holdfast.testing.cloud.market import Market  # noqa: E402
from holdfast.testing.servers import ministack_server  # noqa: E402

EXAMPLE = ROOT / "examples" / "chargpt"
TICK_S = 5
ON_DEMAND = "local/here/a/small/on-demand"


def pools_of(args) -> list[dict]:
    spot = [
        {
            "name": f"local/here/{chr(97 + number)}/small/spot",
            "trace": {
                "file": str(path.resolve()), "marks": args.marks, "machines": 2, "spot": price, "on_demand": args.on_demand,
                "from_s": args.from_s, "speed": args.speed,
            },
        }
        for number, (path, price) in enumerate(zip(args.trace, args.spot.split(","), strict=True))
    ]  # fmt: skip
    return [*spot, {"name": ON_DEMAND, "price": args.on_demand}]


def forecast(args, work_s: int, changeover_s: int, deadline_s: int, interval_s: int) -> dict:
    """On exactly the capacity that the rehearsal cloud will have."""
    spot = [PoolConfig(name=each["name"], trace=TraceConfig(**each["trace"])) for each in pools_of(args)[:-1]]
    market = Market.of(CloudConfig(pools=spot), Path("."))
    ticks = deadline_s // TICK_S + 1
    capacity = [[market.capacity[pool.name].at(tick * TICK_S) for tick in range(ticks)] for pool in spot]
    prices = [[market.microusd_h[pool.name].at(tick * TICK_S) for tick in range(ticks)] for pool in spot]
    trace = Trace(
        pools=tuple(pool.name for pool in spot), tick_s=TICK_S, capacity=np.array(capacity, np.int32),
        microusd_h=np.array(prices, np.int64), on_demand_microusd_h=round(float(args.on_demand) * 1e6),
    )  # fmt: skip
    job = Job(work_s=work_s, deadline_s=deadline_s, changeover_s=changeover_s, max_lost_s=interval_s)
    found = simulate(trace, policy_named("ours"), Workload(job=job, asks=True), np.array([0]))
    return {
        "usd": int(found.microusd[0]) / 1e6, "done_s": int(found.finish_s[0]), "preemptions": int(found.preemptions[0]),
        "billed_s": int(found.billed_s[0]), "on_demand_s": int(found.on_demand_s[0]), "lost_s": int(found.lost_s[0]),
        "changeover_s": int(found.changeover_s[0]), "launches": int(found.spot_launches[0] + found.on_demand_launches[0]),
    }  # fmt: skip


def train_alone(url: str, arguments: list[str], folder: Path) -> tuple[float, dict]:
    """Seconds from the first step to the end, and the proof."""
    proof = folder / "reference.json"
    command = [sys.executable, "-u", "train.py", "--url", url, "--proof", str(proof), *arguments]
    begun_s = None
    with subprocess.Popen(command, cwd=EXAMPLE, stdout=subprocess.PIPE, text=True) as training:
        for _ in training.stdout:
            begun_s = begun_s or time.monotonic()
    if training.returncode:
        raise SystemExit("the reference has failed")
    return time.monotonic() - begun_s, json.loads(proof.read_text())


class Mischief(threading.Thread):
    """Kills the controller now and then, and suspends it once."""

    def __init__(self, world: Rehearsal, every_s: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._world, self._every_s, self._rng = world, every_s, random.Random(seed)
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.kills = self.suspensions = 0

    def run(self) -> None:
        while not self.over.wait(self._every_s * self._rng.uniform(0.5, 1.5)):
            with self.lock:
                if self._world.controller.poll() is not None:
                    return
                if self.kills == 2 and not self.suspensions:
                    self._world.suspend_controller()
                    self.suspensions += 1
                else:
                    self._world.kill_controller()
                    self.kills += 1
                self._world.go_on()
            if self.suspensions == 1 and self.kills == 4:
                self._world.wake_controllers()


def rehearse(
    args, folder: Path, url: str, environment: dict, arguments: list[str], changeover_s: int, work_s: int
) -> dict:
    config = {
        "network": "shared", "grace_s": 5, "metadata": "aws", "seed": args.seed, "types": {"small": {"cpus": 2, "memory_gib": 8}},
        "notice": {"lead_s": args.notice_s, "chance": 0.75}, "billing": {"minimum_s": 1}, "pools": pools_of(args),
        "environment": environment,
    }  # fmt: skip
    run = f"python train.py {' '.join(arguments)} --proof proof.json\necho proof: $(cat proof.json)"
    limits = {
        "budget": args.budget,
        "deadline": args.deadline,
        "plan": {"work": f"{work_s} s", "changeover": f"{changeover_s} s"},
    }
    world = Rehearsal(
        folder, config, {"name": "rehearsal", "run": run, "workdir": str(EXAMPLE), **limits}, IMPATIENT, url=url
    )
    begun_unix_s, mischief = time.time(), Mischief(world, args.kill_every_s, args.seed)
    try:
        world.launch()
        mischief.start()
        while True:
            code = world.controller.wait()
            with mischief.lock:
                if world.controller.poll() is not None and world.controller.returncode >= 0:
                    break
        mischief.over.set()
        took_s = time.time() - begun_unix_s
        world.wake_controllers()
        assert code == 0, world.story()
        world.check_books()
        others = world.others_left()
        proof = json.loads(re.findall(r"proof: (\{.*\})", world.output())[-1])
        status, invoice = world.status(), world.cloud.invoice()
        log = [json.loads(line) for line in (folder / "cloud" / "log.jsonl").read_text().splitlines()]
    finally:
        mischief.over.set()
        world.end()
    return {
        "took_s": took_s, "begun_unix_s": begun_unix_s, "proof": proof, "status": status, "log": log, "others": others,
        "usd": invoice["total_microusd"] / 1e6, "controller_kills": mischief.kills, "controller_suspensions": mischief.suspensions,
    }  # fmt: skip


def view_of(url: str) -> RunView:
    store = open_store(url)
    try:
        view = RunView()
        for event in RunRecords(store, clock=SystemClock(), tokens=random_token).read():
            view = see(view, event)
        return view
    finally:
        store.close()


def spread(values: list[float]) -> dict | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {
        "n": len(found),
        "median": round(median(found), 2),
        "from": round(min(found), 2),
        "to": round(max(found), 2),
    }


def crashes(url: str, log: list[dict]) -> dict:
    """From a machine's end (or its notice) to the first step of the next attempt, by what it was spent on. Seconds."""
    view = view_of(url)
    store = open_store(url)
    events = [each.event for each in read_events(store)]
    store.close()
    deaths = {each["machine"]: each for each in log if each["event"] == "death"}
    origin = {each["machine"]: each for each in log if each["event"] == "boot"}
    offset_s = next(each["t"] for each in log if each["event"] == "boot") - min(
        each["real_s"] for each in origin.values()
    )
    begun = {each.fields["launch"]: each.unix_s for each in events if each.name == "machine.begun"}
    steps = sorted(each.unix_s for each in events if each.name == "progress")
    ready = sorted(each.unix_s for each in events if each.name == "attempt.started" and "restore_s" in each.fields)
    claims = sorted(each.unix_s for each in events if each.name == "attempt.claimed")
    rows = []
    for launch in view.launches:
        before = next((each for each in reversed(view.launches[: launch.launch - 1]) if each.claimed is not None), None)
        if launch.claimed is None or before is None or before.answer is None or before.answer.machine not in deaths:
            continue
        next_of = lambda times, after: next((each for each in times if each >= after), None)  # noqa: E731
        death_s = deaths[before.answer.machine]["real_s"] + offset_s
        told = before.notice or before.word("notice")
        heard_s = told.at_unix_s if told is not None else None
        claimed_s, begun_s = launch.claimed.at_unix_s, begun.get(launch.launch)
        claim_s = next_of(claims, claimed_s)
        restored_s, step_s = next_of(ready, claimed_s), next_of(steps, claimed_s)
        if None in (begun_s, claim_s, restored_s, step_s):
            continue
        is_standby = launch.intent.predecessor == before.launch
        rows.append(
            {
                "launch": launch.launch, "standby": is_standby, "noticed": heard_s is not None,
                "notice to create": launch.intent.created_unix_s - heard_s if heard_s and is_standby else None,
                "end to create": None if is_standby else launch.intent.created_unix_s - death_s,
                "create to answer": launch.answer.at_unix_s - launch.intent.created_unix_s,
                "answer to claim": claimed_s - launch.answer.at_unix_s,
                "claim to command": begun_s - claimed_s,
                "command to run claimed": claim_s - begun_s,
                "run claimed to restored": restored_s - claim_s,
                "restored to first progress": step_s - restored_s,
                "end to first progress": step_s - death_s,
            }
        )  # fmt: skip
    kinds = {"announced, with a standby": True, "without a standby": False}
    phases = [key for key in rows[0] if key not in ("launch", "standby", "noticed")] if rows else []
    return {
        kind: {"n": len(chosen), **{phase: spread([row[phase] for row in chosen]) for phase in phases}}
        for kind, standby in kinds.items()
        if (chosen := [row for row in rows if row["standby"] is standby])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", required=True, help="CSV `date,number`; once per zone")
    parser.add_argument("--marks", choices=["available", "taken", "machines"], required=True, help="what a 1 means")
    parser.add_argument(
        "--from", dest="from_s", type=int, default=0, help="second of the trace at which the run begins"
    )
    parser.add_argument("--speed", type=int, default=65, help="seconds of the trace in one second")
    parser.add_argument("--spot", default="0.30,0.35", help="dollars per hour, by zone")
    parser.add_argument("--on-demand", default="1.00")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--save-every", default="5 steps")
    parser.add_argument("--deadline", default="25 min")
    parser.add_argument("--changeover", default="25 s", help="as the job file names it")
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--notice-s", type=float, default=15)
    parser.add_argument("--kill-every-s", type=float, default=120, help="the controller, on average")
    parser.add_argument("--bandwidth", default="30 MiB", help="of the line to the store, per second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    deadline_s, changeover_s = int(parse_duration_s(args.deadline)), int(parse_duration_s(args.changeover))
    epochs = 4
    arguments = ["--epochs", str(epochs), "--batches", str(args.steps // epochs), "--workers", "0", "--save-every"]
    with tempfile.TemporaryDirectory(prefix="holdfast-rehearsal-") as name, ministack_server() as server:
        bandwidth = parse_bytes(args.bandwidth)
        with slow_line(server.endpoint, bandwidth) as line:
            environment = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}"}
            os.environ.update(environment)
            bucket, folder = server.make_bucket("runs"), Path(name)
            work_s, proof = train_alone(f"{bucket}/reference", [*arguments, args.save_every], folder)
            interval_s = max(1, round(work_s / args.steps * int(args.save_every.split()[0])))
            expected = forecast(args, round(work_s), changeover_s, deadline_s, interval_s)
            print(f"{work_s:.0f} s of work; forecast: {expected}", flush=True)
            url = f"{bucket}/rehearsal"
            found = rehearse(
                args, folder, url, environment, [*arguments, f"'{args.save_every}'"], changeover_s, round(work_s)
            )
            launches = found["status"]["launches"]
            preempted = [each for each in launches if (each["why"] or "").startswith("preempted")]
            figures = {
                "usd": round(found["usd"], 6), "done_s": round(found["took_s"], 1), "preemptions": len(preempted),
                "billed_s": sum(each["billed_s"] or 0 for each in launches),
                "on_demand_s": sum(each["billed_s"] or 0 for each in launches if (each["pool"] or "").endswith("/on-demand")),
                "launches": len([each for each in launches if each["machine"]]),
            }  # fmt: skip
            result = {
                "about": {
                    "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "python": platform.python_version(),
                    "traces": [path.name for path in args.trace], "from_s": args.from_s, "speed": args.speed,
                    "steps": args.steps, "deadline_s": deadline_s, "budget_usd": args.budget, "bandwidth": args.bandwidth,
                    "note": args.note,
                },
                "work_s": round(work_s, 1), "forecast": expected, "rehearsal": figures,
                "same bits": found["proof"] == proof, "in time": found["took_s"] <= deadline_s,
                "within budget": found["usd"] <= args.budget,
                "controllers": {
                    "killed": found["controller_kills"], "suspended": found["controller_suspensions"], "left with": found["others"],
                },
                "from one attempt to the next, s": crashes(url, found["log"]),
            }  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if not (result["same bits"] and result["in time"] and result["within budget"]):
        raise SystemExit("the rehearsal has failed")


if __name__ == "__main__":
    main()
