"""From the notice to the first step after the restart: how long does each part take?

    .venv-bench/bin/python benchmarks/recovery.py [--size 1GiB] [--rounds 5] [--folder DIR] [--save]

A training with a state of that size runs under `holdfast run`; a file tells it that the machine goes. Measured by the run's own
records: heard, durable, process ended; then the same command again: start, restored, first step. Beside it, interleaved, the same
bytes are written raw with fsync. Written to a folder; the notice leaves plenty of time, so that only the work counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from statistics import median
from typing import Any

from holdfast.core.config import parse_bytes
from holdfast.ledger.read import read_events
from holdfast.store.local import LocalStore

HERE = Path(__file__).resolve().parent
_LEAD_S = 40
_TRAINING = """
    import pathlib, sys, time
    import torch, holdfast
    torch.manual_seed(0)
    layers, ready, last = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(layers))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model:
        parameter.grad = torch.randn(1024, 1024)
    with holdfast.Run(save_every="1000000 steps", notice=None, progress=False) as run:
        run.track(model=model, optimizer=optimizer)
        for batch in run.batches(range(1_000_000)):
            optimizer.step()
            if run.step == 3:
                run.save()          # so that bandwidth is known, as in any run that has saved once
            if run.step == 12:
                ready.touch()
            if last and run.step >= last:
                break
"""


def one_round(size_bytes: int, folder: Path) -> dict[str, float]:
    """One preemption and one return. Seconds, by the run's own records."""
    script, notice, ready, url = folder / "train.py", folder / "notice", folder / "ready", folder / "run"
    script.write_text(textwrap.dedent(_TRAINING))
    layers = max(1, size_bytes // (3 * 4 * 1024 * 1024))
    agent = [
        sys.executable,
        "-m",
        "holdfast",
        "run",
        "--run",
        str(url),
        "--notice",
        f"file:{notice}",
        "--no-logs",
        "--",
    ]
    first = subprocess.Popen(
        [*agent, sys.executable, str(script), str(layers), str(ready), "0"], stderr=subprocess.DEVNULL
    )
    while not ready.exists():
        if first.poll() is not None:
            raise SystemExit(f"the training ended by itself with code {first.returncode}")
        time.sleep(0.05)
    time.sleep(2.0)
    notice.write_text(f"{_LEAD_S}s")
    told_s = time.time()
    code = first.wait()
    ended_s = time.time()
    if code != 75:
        raise SystemExit(f"expected exit code 75, not {code}")
    notice.unlink()
    store = LocalStore(url)
    events = [recorded.event for recorded in read_events(store)]
    heard_s = min(event.unix_s for event in events if event.name == "notice.heard")
    saves = [event for event in events if event.name == "save.committed" and event.unix_s > heard_s]
    insured = saves[0]
    again_s = time.time()
    subprocess.run(
        [*agent, sys.executable, str(script), str(layers), str(ready), str(saves[-1].fields["step"] + 1)],
        stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    events = [recorded.event for recorded in read_events(store)]
    started = max((event for event in events if event.name == "attempt.started"), key=lambda event: event.unix_s)
    finished = max((event for event in events if event.name == "attempt.finished"), key=lambda event: event.unix_s)
    store.close()
    return {
        "detect_s": heard_s - told_s,
        "notice_to_durable_s": insured.unix_s - heard_s,
        "last_save_s": saves[-1].fields["durable_s"],
        "last_save_to_exit_s": ended_s - saves[-1].unix_s,
        "start_to_restored_s": started.unix_s - again_s,
        "restore_s": float(finished.fields.get("restore_s") or 0.0),
        "first_step_s": float(finished.fields.get("first_step_s") or 0.0),
    }


def raw(size_bytes: int, folder: Path) -> float:
    piece = os.urandom(1 << 20) * 64
    path = folder / "raw"
    os.sync()
    started_s = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        left = size_bytes
        while left > 0:
            left -= file.write(piece[: min(left, len(piece))])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started_s
    path.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    parser.add_argument("--save", action="store_true", help="write results/recovery-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    size_bytes = parse_bytes(arguments.size)
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".bench-") as folder:
            figures = one_round(size_bytes, Path(folder))
            figures["raw_write_fsync_s"] = raw(size_bytes, Path(folder))
        rounds.append(figures)
        print(f"round {number + 1}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    ratios = [item["notice_to_durable_s"] / item["raw_write_fsync_s"] for item in rounds]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "size_bytes": size_bytes, "rounds": rounds,
        "medians": {name: median(item[name] for item in rounds) for name in rounds[0]},
        "notice_to_durable_over_raw": {"median": median(ratios), "min": min(ratios), "max": max(ratios), "target": 1.2},
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("medians", "notice_to_durable_over_raw")}, indent=1))
    if arguments.save:
        path = HERE / "results" / f"recovery-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
