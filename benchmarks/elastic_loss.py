"""The loss of a run whose number of ranks changes again and again, on top of that of a run whose number stays the same.

    .venv/bin/python benchmarks/elastic_loss.py [--save]

gloo on this machine, DDP. The elastic run is told to stop (SIGTERM to a random rank) after a random number of steps, and goes on
with the next number of ranks. Both have the same global batch; the model has no dropout, so only the order of sums differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

SIZES = (4, 2, 3, 1, 2, 4, 1, 3)
FIXED = 2
EPOCHS, SAMPLES, GLOBAL_BATCH, MICRO_BATCH = 12, 1200, 48, 16
STEPS = EPOCHS * SAMPLES // GLOBAL_BATCH


def rank_main(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from holdfast import Run

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
    inputs = torch.randn(SAMPLES, 16)
    with torch.no_grad():
        labels = (teacher(inputs) + 0.1 * torch.randn(SAMPLES, 5)).argmax(1)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 5)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=MICRO_BATCH, shuffle=True)
    of_step = torch.zeros(1)
    with Run(str(folder / "run"), save_every="1000 steps", notice="none", progress=False, seed=3) as run:
        run.track(model=model, optimizer=optimizer)
        for x, y in run.batches(loader, epochs=EPOCHS, global_batch=GLOBAL_BATCH):
            with run.accumulating(model):
                loss = nn.functional.cross_entropy(model(x), y) * run.micro.weight
                loss.backward()
            of_step += loss.detach()
            if run.micro.last:
                optimizer.step()
                optimizer.zero_grad()
                dist.all_reduce(of_step)
                if dist.get_rank() == 0:
                    with (folder / "loss").open("a") as file:
                        file.write(f"{run.step + 1} {float(of_step) / dist.get_world_size():.9g}\n")
                of_step.zero_()
    dist.destroy_process_group()


def start(folder: Path, size: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [
        {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        for rank in range(size)
    ]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", "--folder", str(folder)]
    return [
        subprocess.Popen(command, env=os.environ | shared | place, stderr=subprocess.DEVNULL if rank else None)
        for rank, place in enumerate(places)
    ]


def losses(folder: Path) -> dict[int, float]:
    path = folder / "loss"
    if not path.exists():
        return {}
    lines = [line.split() for line in path.read_text().splitlines()]
    steps = [int(step) for step, _ in lines]
    assert len(steps) == len(set(steps)), "a step was computed twice, though every stop was an orderly one"
    return {int(step): float(loss) for step, loss in lines}


def fixed(folder: Path) -> dict[int, float]:
    assert [process.wait() for process in start(folder, FIXED)] == [0] * FIXED
    return losses(folder)


def elastic(folder: Path, rng: random.Random) -> tuple[dict[int, float], list[tuple[int, int]]]:
    """The losses; and from which step on it had how many ranks."""
    worlds = []
    for size in cycle(SIZES):
        before = len(losses(folder))
        worlds.append((before + 1, size))
        processes = start(folder, size)
        goal = before + rng.randrange(12, 32)
        while len(losses(folder)) < goal and processes[0].poll() is None:
            time.sleep(0.02)
        if len(losses(folder)) < STEPS:
            rng.choice(processes).send_signal(signal.SIGTERM)
        codes = {process.wait() for process in processes}
        if codes == {0}:
            return losses(folder), worlds
        assert codes == {75}, codes
    raise AssertionError


def draw(path: Path, one: dict[int, float], other: dict[int, float], worlds: list[tuple[int, int]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = sorted(one)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    above.plot(steps, [one[step] for step in steps], color="#b0b7c3", linewidth=4, label=f"{FIXED} ranks throughout")
    above.plot(steps, [other[step] for step in steps], color="#1f5fbf", linewidth=1, label="number of ranks as below")
    above.set_ylabel("loss of the step")
    above.set_title(f"{len(worlds) - 1} changes of the number of ranks, global batch {GLOBAL_BATCH}", loc="left")
    above.legend(frameon=False)
    starts = [begin for begin, _ in worlds] + [STEPS + 1]
    for (begin, size), end in zip(worlds, starts[1:], strict=True):
        below.hlines(size, begin, end, color="#1f5fbf", linewidth=3)
        above.axvline(begin, color="#b0b7c3", linewidth=0.5)
    below.set_ylabel("ranks")
    below.set_yticks(range(1, max(SIZES) + 1))
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="write results/elastic-loss-<date>.json and .png")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / name for name in ("fixed", "elastic")]
        for place in places:
            place.mkdir()
        one = fixed(places[0])
        other, worlds = elastic(places[1], random.Random(5))
    assert one.keys() == other.keys() == set(range(1, STEPS + 1)), "not every step is there once"
    furthest = max(abs(one[step] - other[step]) for step in one)
    print(
        f"{len(worlds) - 1} changes of the number of ranks over {STEPS} steps; losses differ by {furthest:.2g} at most"
    )
    date = time.strftime("%Y-%m-%d")
    base = Path(__file__).resolve().parent / "results" if arguments.save else Path.cwd()
    draw(base / f"elastic-loss-{date}.png", one, other, worlds)
    if arguments.save:
        result = {
            "date": date, "steps": STEPS, "worlds": worlds, "largest_difference": furthest,
            "fixed": list(one.values()), "elastic": [other[step] for step in one],
        }  # fmt: skip
        (base / f"elastic-loss-{date}.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
