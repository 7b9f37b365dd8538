"""From the death of a rank to the next step of the job: what is memory worth that outlives the ranks?

    .venv/bin/python benchmarks/rank_death.py [--size 1GiB] [--rounds 5] [--folder DIR] [--save]

Two gloo ranks on this machine under torchrun, DDP (a replica on each rank) or FSDP2 (a shard on each). One is killed when a
checkpoint is durable; torchrun ends the other and starts both again. Contestants take turns; the slowest rank counts:

    memory     under `holdfast run`, which holds the ranks' staging memory: they restore from there
    storage    without it: they restore from the store, a folder on the disk that is not in the page cache

    noticed    torchrun has seen it, ended the other rank and started both again        imports   torch and holdfast are loaded
    group      init_process_group; model and optimizer are made                         restore   run claimed, state loaded
    step       the first step is done
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
CONTESTANTS = ("memory", "storage")
PARTS = ("noticed", "imports", "group", "restore", "step")
RANKS = 2
SAVED_AT = 3
GIVE_UP_S = 300.0


def rank_main(folder: Path, kind: str, size_bytes: int) -> None:
    rank, round_ = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def note(what: str) -> None:
        line = {"what": what, "round": round_, "rank": rank, "pid": os.getpid(), "unix_s": time.time()}
        with (folder / f"notes-{rank}.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")

    note("noticed")
    import torch.distributed as dist

    import holdfast
    from ranks import build

    note("imports")
    dist.init_process_group("gloo")
    model, optimizer = build(kind, size_bytes, seed=1)
    note("group")
    with holdfast.Run(str(folder / "run"), save_every="1000000 steps", notice="none", progress=False, seed=0) as run:
        run.track(model=model, optimizer=optimizer)
        run.restore()
        note("restore")
        handle = None
        for _ in run.batches(range(1_000_000)):
            if run.step == SAVED_AT and round_ == 0:
                handle = run.save()
            elif handle is not None and handle.done():
                handle.wait()
                note("durable")
                handle = None
            note("step")
            time.sleep(0.1)


def notes(folder: Path, what: str, round_: int) -> dict[str, dict[str, Any]]:
    """By rank, the first of them."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("notes-*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                one = json.loads(line)
                if (one["what"], one["round"]) == (what, round_):
                    found.setdefault(one["rank"], one)
    return found


def until_all(folder: Path, what: str, round_: int, job: subprocess.Popen[bytes]) -> dict[str, dict[str, Any]]:
    until_s = time.monotonic() + GIVE_UP_S
    while len(found := notes(folder, what, round_)) < RANKS:
        if time.monotonic() > until_s or job.poll() is not None:
            raise RuntimeError(f"not all ranks came to {what!r}:\n" + (folder / "log").read_text()[-4000:])
        time.sleep(0.05)
    return found


def strike(folder: Path, kind: str, size_bytes: int, contestant: str) -> dict[str, float]:
    tools = Path(sys.executable).parent
    command = [str(tools / "torchrun"), f"--nproc-per-node={RANKS}", "--max-restarts=3", "--standalone"]
    command += [str(Path(__file__).resolve()), "--rank-of", str(folder), kind, str(size_bytes)]
    if contestant == "memory":
        command = [str(tools / "holdfast"), "run", "--notice", "none", "--", *command]
    environ = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
        # Without it torch's rendezvous hands the new workers the addresses of the dead ones (docs/ranks.md).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        job = subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            pids = until_all(folder, "durable", 0, job)
            evict(folder / "run")
            struck_s = time.time()
            os.kill(pids["1"]["pid"], signal.SIGKILL)
            moments = [struck_s]
            for what in PARTS:
                moments.append(max(one["unix_s"] for one in until_all(folder, what, 1, job).values()))
        finally:
            os.killpg(job.pid, signal.SIGTERM)
            try:
                job.wait(60)
            finally:
                end_all(folder)
    parts = {part: later - sooner for part, sooner, later in zip(PARTS, moments[:-1], moments[1:], strict=True)}
    return {**parts, "in all": moments[-1] - struck_s}


def evict(folder: Path) -> None:
    """Let the next reader find nothing of it in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def end_all(folder: Path) -> None:
    """Whoever still runs: torchrun gives its workers groups of their own."""
    for path in folder.glob("notes-*.jsonl"):
        for pid in {json.loads(line)["pid"] for line in path.read_text().splitlines()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def main() -> None:
    from holdfast.core.config import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB", help="of the whole state: weights and AdamW's moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--save", action="store_true", help="write results/rank-death-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    size_bytes = parse_bytes(arguments.size)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    result["size_bytes"] = size_bytes
    for kind in ("ddp", "fsdp"):
        found: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in CONTESTANTS}
        for _ in range(arguments.rounds):
            for contestant in CONTESTANTS:
                with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
                    found[contestant].append(strike(Path(folder), kind, size_bytes, contestant))
                said = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found[contestant][-1].items())
                print(f"{kind:4} {contestant:8} {said}", flush=True)
        medians = {
            name: {part: round(median(one[part] for one in strikes), 3) for part in strikes[0]}
            for name, strikes in found.items()
        }
        ratio = median(
            memory["restore"] / storage["restore"]
            for memory, storage in zip(found["memory"], found["storage"], strict=True)
        )
        print(f"{kind}: {json.dumps(medians)}; restore from memory {ratio:.2f} x from storage")
        result[kind] = {"strikes": found, "medians": medians, "restore memory / storage": round(ratio, 3)}
    if arguments.save:
        path = HERE / "results" / f"rank-death-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        rank_main(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
