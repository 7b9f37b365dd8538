"""What a save and a resume cost: the stall, the time until durable, the restore, the bytes, and the loop's own price.

    python benchmarks/checkpoint.py [--size-mib 512] [--repeats 7] [--folder DIR] [--out FILE]

Everything is measured side by side in one process, interleaved, and given as the median with its range. The yardsticks are a warm
copy of the same bytes, the same bytes written raw with fsync, and `torch.save` with fsync / `torch.load` with `load_state_dict`.
The state is a model with AdamW: parameters and two moments, every byte of which changes at every step.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.ledger.read import read_events, summarise
from holdfast.store.open import open_store

MIB = 1 << 20


class Layers(nn.Module):
    """`mib` MiB of float32 parameters in layers of 4 MiB; the first `frozen` of them do not train."""

    def __init__(self, mib: int, frozen: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(MIB) * 0.01) for _ in range(max(1, mib // 4)))
        for parameter in list(self.layers)[: int(len(self.layers) * frozen)]:
            parameter.requires_grad_(False)


def built(mib: int, frozen: float = 0.0) -> tuple[Layers, torch.optim.Optimizer]:
    """A model and AdamW whose state exists, `mib` MiB together when nothing is frozen."""
    torch.manual_seed(0)
    model = Layers(mib // 3, frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(model, optimizer)
    return model, optimizer


def step(model: Layers, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def timed(action: Callable[[], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fsynced(path: Path, write: Callable[[Any], None]) -> None:
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_raw(path: Path, tensors: list[torch.Tensor]) -> float:
    buffers = [tensor.view(torch.uint8).numpy() for tensor in tensors]
    seconds = timed(lambda: fsynced(path, lambda file: [file.write(buffer) for buffer in buffers]))
    path.unlink()
    return seconds


def write_torch(path: Path, model: Layers, optimizer: torch.optim.Optimizer) -> float:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    seconds = timed(lambda: fsynced(path, lambda file: torch.save(state, file)))
    path.unlink()
    return seconds


class Bench:
    """Collects seconds by name, one sample per round."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])


def measure_saves(bench: Bench, folder: Path, mib: int, repeats: int, tick: Callable[[], None]) -> dict[str, float]:
    """Stall and time until durable of ordinary saves, beside the yardsticks."""
    model, optimizer = built(mib)
    source = [p.detach() for p in model.parameters()] + [
        v for state in optimizer.state.values() for v in state.values() if v.numel() > 1
    ]
    target = [torch.empty_like(tensor) for tensor in source]
    torch._foreach_copy_(target, source)
    url = str(folder / "run")
    with quiet(), holdfast.Run(url, save_every="1000000 steps", keep=1) as run:
        run.track(model=model, optimizer=optimizer)
        run.restore()
        run.save().wait()
        for _ in range(repeats):
            step(model, optimizer)
            bench.add("warm copy", timed(lambda: torch._foreach_copy_(target, source)))
            started = time.perf_counter()
            handle = run.save()
            bench.add("holdfast: stall", time.perf_counter() - started)
            handle.wait()
            bench.add("holdfast: durable", time.perf_counter() - started)
            bench.add("raw write + fsync", write_raw(folder / "raw", source))
            bench.add("torch.save + fsync", write_torch(folder / "state.pt", model, optimizer))
            tick()
    with contextlib.closing(open_store(url)) as store:
        attempt = summarise(read_events(store)).attempts[0]
    shutil.rmtree(folder / "run")
    return {"sent_bytes_per_save": attempt.sent_bytes / attempt.saves}


def measure_restores(bench: Bench, folder: Path, mib: int, repeats: int, tick: Callable[[], None]) -> None:
    """A verified restore into live objects, beside torch.load + load_state_dict."""
    model, optimizer = built(mib)
    url, path = str(folder / "run"), folder / "state.pt"
    with quiet(), holdfast.Run(url, save_every="1000000 steps") as run:
        run.track(model=model, optimizer=optimizer)
        run.restore()
    fsynced(path, lambda f: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f))

    def ours() -> float:
        fresh, adam = Layers(mib // 3), None
        adam = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
        with quiet():
            reader = holdfast.Run(url)
            reader.track(model=fresh, optimizer=adam)
            seconds = timed(reader.restore)
            reader.close()
        return seconds

    def torchs() -> float:
        fresh = Layers(mib // 3)
        adam = torch.optim.AdamW(fresh.parameters(), lr=1e-3)

        def load() -> None:
            state = torch.load(path, weights_only=True)
            fresh.load_state_dict(state["model"])
            adam.load_state_dict(state["optimizer"])

        return timed(load)

    for _ in range(repeats):
        bench.add("holdfast: restore", ours())
        bench.add("torch.load + load_state_dict", torchs())
        tick()
    shutil.rmtree(folder / "run")
    path.unlink()


def measure_frozen(bench: Bench, folder: Path, mib: int, repeats: int, tick: Callable[[], None]) -> dict[str, float]:
    """90 % of the parameters frozen: the first save sends everything, the second only what changed."""
    model, optimizer = built(mib, frozen=0.9)
    shares = []
    for _ in range(repeats):
        url = str(folder / "run")
        with quiet(), holdfast.Run(url, save_every="1000000 steps", keep=1) as run:
            run.track(model=model, optimizer=optimizer)
            run.restore()
            run.save().wait()
            step(model, optimizer)
            bench.add("90 % frozen, nothing sent yet: durable", first_save(folder / "other", model, optimizer))
            bench.add("90 % frozen, second save: durable", timed(lambda: run.save().wait()))
        with contextlib.closing(open_store(url)) as store:
            saves = [r.event.fields for r in read_events(store) if r.event.name == "save.committed"]
        shares.append(saves[1]["sent_bytes"] / saves[1]["total_bytes"])
        shutil.rmtree(folder / "run")
        tick()
    trained = sum(parameter.requires_grad for parameter in model.layers) / len(model.layers)
    changing = 3 * trained / (1 + 2 * trained)
    return {"90 % frozen: share sent": statistics.median(shares), "90 % frozen: share that changes": changing}


def first_save(folder: Path, model: Layers, optimizer: torch.optim.Optimizer) -> float:
    """A save of a new run, which has nothing to refer to. Its staging memory is made beforehand by a save of other values."""
    with torch.no_grad(), holdfast.Run(str(folder), save_every="1000000 steps", keep=1) as run:
        run.track(model=model, optimizer=optimizer)
        run.restore()
        kept = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.add_(1.0)
        run.save().wait()
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
        seconds = timed(lambda: run.save().wait())
    shutil.rmtree(folder)
    return seconds


def measure_loop(bench: Bench, folder: Path, repeats: int, tick: Callable[[], None]) -> None:
    """Seconds per step of an empty loop body: `run.batches` beside the bare loader."""
    data = TensorDataset(torch.randn(4096, 8), torch.zeros(4096))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    with quiet(), holdfast.Run(str(folder / "run"), save_every="1 h") as run:
        state = {"n": 0}
        run.track(state=state)
        for epoch in run.epochs(2 * repeats):
            started = time.perf_counter()
            if epoch % 2:
                for _ in loader:
                    pass
                bench.add("bare loop, per step", (time.perf_counter() - started) / len(loader))
            else:
                for _ in run.batches(loader):
                    pass
                bench.add("run.batches, per step", (time.perf_counter() - started) / len(loader))
            tick()
    shutil.rmtree(folder / "run")


RATIOS = [
    ("holdfast: stall", "warm copy", "the loop stands still, against one warm copy of the bytes"),
    ("holdfast: durable", "raw write + fsync", "durable and hashed, against the same bytes raw"),
    ("holdfast: durable", "torch.save + fsync", "durable and hashed, against torch.save"),
    ("holdfast: restore", "torch.load + load_state_dict", "verified restore, against torch.load"),
    (
        "90 % frozen, second save: durable",
        "90 % frozen, nothing sent yet: durable",
        "a save with 90 % frozen, against sending it all",
    ),
]


def report(bench: Bench, figures: dict[str, float], mib: int, console: Console) -> dict[str, Any]:
    table = Table(title=f"{mib} MiB of parameters and AdamW state; seconds: median (range)")
    for heading in ("measured", "median", "range", "n"):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    for name, samples in bench.samples.items():
        table.add_row(
            name, f"{statistics.median(samples):.6f}", f"{min(samples):.6f} to {max(samples):.6f}", str(len(samples))
        )
    console.print(table)
    ratios = {f"{a} / {b}": bench.median(a) / bench.median(b) for a, b, _ in RATIOS}
    for (a, b, meaning), ratio in zip(RATIOS, ratios.values(), strict=True):
        console.print(f"  {ratio:5.2f}  {meaning}  [dim]({a} / {b})[/dim]")
    own_us = 1e6 * (bench.median("run.batches, per step") - bench.median("bare loop, per step"))
    console.print(f"  {own_us:5.1f} µs a step is the loop's own cost")
    for name, value in figures.items():
        console.print(f"  {name} = {value:.4g}")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpus": os.cpu_count(), "cpu": platform.machine(), "torch": str(torch.__version__)},
        "size_mib": mib,
        "seconds": bench.samples,
        "ratios": ratios,
        "loop_cost_us": own_us,
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to be measured")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    console, bench, repeats, mib = Console(), Bench(), arguments.repeats, arguments.size_mib
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".bench-") as name, Progress(console=console) as bar:
        task = bar.add_task("measuring", total=repeats * 5)
        folder = Path(name)

        def tick() -> None:
            bar.advance(task)

        figures = measure_saves(bench, folder, mib, repeats, tick)
        measure_restores(bench, folder, mib, repeats, tick)
        figures |= measure_frozen(bench, folder, mib, repeats, tick)
        measure_loop(bench, folder, repeats, tick)
    result = report(bench, figures, mib, console)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
