"""Each adapter beside its framework's own resume: what a kill costs, what a save costs, how long a restart takes.

    python benchmarks/adapters.py [--frameworks huggingface,lightning,accelerate] [--rounds 5] [--json FILE]

For every framework (adapters_huggingface.py, _lightning.py, _accelerate.py) two ways, "own" and "holdfast":

  killed      60 optimizer steps of 50 ms with dropout and accumulation, a save every 10, SIGKILL in steps 17, 33 and 38, against
              the same way uninterrupted; once with samples that never change, once with random augmentation; and SIGTERM in step 17
  stall       60 steps with a state of 150 MB, with and without four saves, interleaved: the difference per save, whatever it
              consists of. Says something on a quiet machine only
  restarted   killed 255 steps into a long epoch whose samples cost 2 ms, then started again: time and samples up to the first step

Trainings are forked from a process that has the framework imported, so no import is timed. The ratios are what matters.
"""

# mypy: ignore-errors
from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from statistics import median

from adapters_training import BATCH, EPOCH_STEPS, Job

FRAMEWORKS = ("huggingface", "lightning", "accelerate")
WAYS = ("own", "holdfast")
PARTS = ("killed", "restarted", "stall")
KILLS, STEPS, SAVE_STEPS = (17, 33, 38), 60, 10
STALL_STEPS, STALL_SAVE_STEPS = 60, 12
RESTART_STEP = 255


# ---- processes


class Server:
    """Has a framework imported, and forks a process for every job."""

    def __init__(self, framework: str) -> None:
        environ = {**os.environ, "HOLDFAST_NOTICE": "none", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--serve", framework]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        self.about = json.loads(self.process.stdout.readline())

    def do(self, job: Job) -> int:
        """Its exit code; negative for a signal."""
        print(json.dumps(asdict(job)), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def serve(framework: str) -> None:
    module = importlib.import_module(f"adapters_{framework}")
    print(json.dumps([module.VERSION, module.OWN, module.VARIANTS, module.CHECKPOINTS]), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(module, Job(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _child(module, job: Job) -> None:
    code = 1
    try:
        job.path.mkdir(parents=True, exist_ok=True)
        said = os.open(job.path / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        module.train(job)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# ---- what a job has left


def lines_of(folder: Path, name: str) -> list:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attempts_of(folder: Path) -> list[list]:
    """The lines of each attempt, without the one at its beginning, and the time of that."""
    found: list[list] = []
    for line in lines_of(folder, "steps"):
        if line[0] == 0:
            found.append([line])
        else:
            found[-1].append(line)
    return found


def samples_of(folder: Path) -> dict[int, list[int]]:
    """By step. Of a step that was made twice, the last counts: it is in the weights."""
    return {step: used for step, used, _, _ in lines_of(folder, "steps") if step}


def log_of(folder: Path) -> dict[tuple, object]:
    """By step and figures; of two lines about the same, the last."""
    return {(step, *sorted(figures)): figures for step, figures in lines_of(folder, "log")}


# ---- what is measured


def killed(server: Server, how: str, folder: Path, data: str) -> dict:
    reference, victim = folder / "reference", folder / "killed"
    done = server.do(Job(how, str(reference), data, STEPS, SAVE_STEPS))
    assert done == 0, (reference / "said").read_text()
    torn = 0
    for step in (*KILLS, None):
        strike = None if step is None else [step, signal.SIGKILL]
        while server.do(Job(how, str(victim), data, STEPS, SAVE_STEPS, strike)) != (-signal.SIGKILL if step else 0):
            # It does not start any more: what a person would do is take the half-written checkpoint away.
            broken = sorted(victim.glob(server.about[3]), key=lambda path: path.stat().st_mtime)
            assert broken, (victim / "said").read_text()[-3000:]
            (shutil.rmtree if broken[-1].is_dir() else os.unlink)(broken[-1])
            torn += 1
    before, after = (json.loads((path / "outcome").read_text()) for path in (reference, victim))
    once, again = samples_of(reference), samples_of(victim)
    first_epoch = [index for step in range(1, EPOCH_STEPS + 1) for index in again.get(step, [])]
    logs = [log_of(path) for path in (reference, victim)]
    count = sum(step > 0 for step, *_ in lines_of(victim, "steps"))
    return {
        "same weights": before["weights"] == after["weights"],
        "steps whose samples differ": sum(once.get(step) != again.get(step) for step in range(1, STEPS + 1)),
        "repeated in the first epoch": len(first_epoch) - len(set(first_epoch)),
        "left out of the first epoch": EPOCH_STEPS * BATCH * 2 - len(set(first_epoch)),
        "log entries": len(logs[0]),
        "log entries that differ": sum(logs[0].get(key) != logs[1].get(key) for key in logs[0].keys() | logs[1].keys()),
        "callback's state is the same": before["state"] == after["state"],
        "steps computed again": count - len(again),
        "torn checkpoints to remove by hand": torn,
    }


def terminated(server: Server, how: str, folder: Path) -> dict:
    code = server.do(Job(how, str(folder), "augmented", 1_000 * STEPS, SAVE_STEPS, [KILLS[0], signal.SIGTERM]))
    reached = attempts_of(folder)[-1][-1][0]
    if code == 0 and reached >= 1_000 * STEPS:
        return {"exit code": 0, "trains on to the end": True, "steps lost": None}
    server.do(Job(how, str(folder), "augmented", 1_000 * STEPS, SAVE_STEPS, [-1, signal.SIGKILL]))
    again = attempts_of(folder)[-1]
    return {"exit code": code, "trains on to the end": False, "steps lost": reached + 1 - again[1][0]}


def stalled(server: Server, folder: Path, rounds: int) -> dict:
    """Seconds of all steps but the first two, with and without saves; the first round warms up."""
    found: dict[str, dict[str, list[float]]] = {how: {"saved": [], "not saved": []} for how in WAYS}
    turns = [(how, save) for how in WAYS for save in (True, False)]
    for number in range(rounds + 1):
        for how, save in turns[number % 4 :] + turns[: number % 4]:
            here = folder / f"{number}-{how}-{save}"
            os.sync()
            code = server.do(Job(how, str(here), "big", STALL_STEPS, STALL_SAVE_STEPS if save else 0))
            assert code == 0, (here / "said").read_text()[-3000:]
            at = {step: when for step, _, _, when in lines_of(here, "steps")}
            if number:
                found[how]["saved" if save else "not saved"].append(at[STALL_STEPS - 1] - at[2])
            shutil.rmtree(here)
    saves = (STALL_STEPS - 1) // STALL_SAVE_STEPS
    result: dict = {}
    for how, times in found.items():
        each = [(a - b) / saves for a, b in zip(times["saved"], times["not saved"], strict=True)]
        result[how] = {"seconds per save": spread(each), "seconds without saves": spread(times["not saved"])}
    own, mine = (result[how]["seconds per save"]["median"] for how in WAYS)
    result["ratio, holdfast to own"] = round(mine / own, 3) if own > 0 and mine > 0 else None
    return result


def spread(values: list[float]) -> dict:
    return {"median": round(median(values), 4), "from": round(min(values), 4), "to": round(max(values), 4)}


def restarted(server: Server, folder: Path, data: str, rounds: int) -> dict:
    wanted = {}
    for how in WAYS:
        server.do(Job(how, str(folder / how / "once"), data, RESTART_STEP + 5, 10))
        wanted[how] = samples_of(folder / how / "once")
        server.do(Job(how, str(folder / how / "killed"), data, 10 * RESTART_STEP, 10, [RESTART_STEP, signal.SIGKILL]))
    found: dict[str, list] = {how: [] for how in WAYS}
    for number in range(rounds):
        for how in WAYS if number % 2 == 0 else WAYS[::-1]:
            here = folder / how / "killed"
            code = server.do(Job(how, str(here), data, 10 * RESTART_STEP, 10, [-1, signal.SIGKILL]))
            assert code == -signal.SIGKILL, (here / "said").read_text()[-3000:]
            begun, first = attempts_of(here)[-1][:2]
            found[how].append((first[3] - begun[3], first[2], first[0], first[1]))
    return {
        how: {
            "seconds to the first step": spread([seconds for seconds, *_ in found[how]]),
            "samples read": int(median(count for _, count, *_ in found[how])),
            "first step": found[how][-1][2],
            "its samples are the right ones": all(used == wanted[how].get(step) for _, _, step, used in found[how]),
        }
        for how in WAYS
    }


# ---- the report


def measure(framework: str, folder: Path, rounds: int, parts: list[str]) -> dict:
    server = Server(framework)
    version, own, variants, _ = server.about
    results: dict = {"version": version, "own way": own}
    if "killed" in parts:
        results["killed"] = {
            how: {data: killed(server, how, folder / how / data, data) for data in ("plain", "augmented")}
            for how in WAYS
        }
        results["terminated"] = {
            how: terminated(server, how, folder / how / "terminated") for how in (*WAYS, *variants)
        }
    for data in ("map", "stream") if "restarted" in parts else ():
        results[f"restarted, {data}"] = restarted(server, folder / "restarted" / data, data, rounds)
    if "stall" in parts:
        results["stall"] = stalled(server, folder / "stall", rounds)
    server.close()
    return results


def told(results: dict) -> str:
    """A table in Markdown."""
    rows: list[tuple[str, list[str]]] = []
    columns = [(name, how) for name in results for how in WAYS]

    def row(what: str, figure) -> None:
        rows.append((what, [str(figure(results[name], how)) for name, how in columns]))

    yes = {True: "yes", False: "**no**"}
    for data, words in (("plain", "samples that never change"), ("augmented", "random augmentation")):
        row(f"the same weights, {words}", lambda r, how, d=data: yes[r["killed"][how][d]["same weights"]])
    row("steps (of 60) with other samples", lambda r, how: r["killed"][how]["plain"]["steps whose samples differ"])
    row("samples repeated / left out, first epoch (of 200)", lambda r, how: " / ".join(
        str(r["killed"][how]["plain"][f"{what} the first epoch"]) for what in ("repeated in", "left out of")))  # fmt: skip
    row("log entries that differ, without / with augmentation", lambda r, how: " / ".join(
        f"{r['killed'][how][data]['log entries that differ']}" for data in ("plain", "augmented")
    ) + f" of {r['killed'][how]['plain']['log entries']}")  # fmt: skip
    row("a callback's state", lambda r, how: yes[r["killed"][how]["plain"]["callback's state is the same"]])
    row("steps computed again", lambda r, how: " / ".join(
        str(r["killed"][how][data]["steps computed again"]) for data in ("plain", "augmented")))  # fmt: skip
    row("SIGTERM: steps lost (exit code)", lambda r, how: "ignored" if r["terminated"][how]["trains on to the end"]
        else f"{r['terminated'][how]['steps lost']} ({r['terminated'][how]['exit code']})")  # fmt: skip
    if all("stall" in found for found in results.values()):
        row("a save of 150 MB takes, s", lambda r, how: _spread(r["stall"][how]["seconds per save"]))
    for data in ("map", "stream"):
        key = f"restarted, {data}"
        row(f"{key}: samples read", lambda r, how, k=key: r[k][how]["samples read"])
        row(f"{key}: to the first step, s", lambda r, how, k=key: _spread(r[k][how]["seconds to the first step"]))
        row(f"{key}: the right samples", lambda r, how, k=key: yes[r[k][how]["its samples are the right ones"]])
    head = ["", *(f"{results[name]['version']}: {'its own' if how == 'own' else 'holdfast'}" for name, how in columns)]
    lines = [head, ["---"] * len(head), *([what, *cells] for what, cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(figures: dict) -> str:
    return f"{figures['median']:.2f} ({figures['from']:.2f} to {figures['to']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS))
    parser.add_argument("--rounds", type=int, default=5, help="of stalls and restarts (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, help="parts and frameworks that are not measured now stay as they are in it"
    )
    parser.add_argument("--note", default="", help="what to say about this machine while it was measured")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"results": {}}
    results: dict = known["results"]
    about = {"cores": os.cpu_count(), "python": platform.python_version(), "rounds": args.rounds, "note": args.note}
    for framework in args.frameworks.split(","):
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(framework, Path(scratch), args.rounds, args.parts.split(","))
            results[framework] = results.get(framework, {}) | found
        print(f"{framework}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    if all({"killed", "restarted, map"} <= set(found) for found in results.values()):
        print(told(results))


if __name__ == "__main__":
    main()
