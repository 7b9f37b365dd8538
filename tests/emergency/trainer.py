"""A small training that a notice interrupts at a place of the test's choice, on a store as slow as the test wants.

As a program it takes one JSON object of `train`'s arguments; with `--zygote` it forks trainings (tests/support/forking.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.append(str(Path(__file__).parents[1] / "support"))

from forking import serve

import holdfast
from holdfast.checkpoint import saver
from holdfast.store.base import Body, Store
from holdfast.store.local import LocalStore

SAMPLES, BATCH, EPOCHS, WIDTH = 160, 4, 3, 24
PER_EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * PER_EPOCH


class SlowStore(LocalStore):
    """Writing and reading data takes as long as files in `control` say: `put` and `read` hold seconds, `block` blocks."""

    control: Path

    def put(self, key: str, body: Body) -> None:
        if key.startswith("data/"):
            self._pause("put")
            while (self.control / "block").exists():
                time.sleep(0.005)
        super().put(key, body)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._pause("read")
        super().read_into(key, offset, buffer)

    def _pause(self, name: str) -> None:
        try:
            time.sleep(float((self.control / name).read_text()))
        except FileNotFoundError:
            return


class Place:
    """Where the test wants the training to be: it says so in a file, and stays until the file is gone or the time is over."""

    def __init__(self, control: Path, wanted: str, stay_s: float, stay: Callable[[float], None]) -> None:
        self._control, self._wanted, self._stay_s, self._stay = control, wanted, stay_s, stay

    def at(self, name: str) -> None:
        if name == self._wanted:
            self._wanted = ""
            mark = self._control / "place"
            mark.write_text(name)
            until_s = time.monotonic() + self._stay_s
            while mark.exists() and time.monotonic() < until_s:
                self._stay(min(self._stay_s, until_s - time.monotonic()))


def compiling(seconds: float) -> None:
    """C code that neither ends nor looks at signals before it is done; the interpreter is free meanwhile."""
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        ctypes.CDLL(None).usleep(int(left_s * 1e6))


class Noisy(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, place: Place) -> None:
        self._place, self._fetched = place, 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self._fetched += 1
        self._place.at(f"waiting:{self._fetched}")
        noise = torch.rand(WIDTH) * random.random() + float(np.random.rand())
        return {"index": torch.tensor(index), "x": index / SAMPLES + 0.1 * noise, "y": torch.tensor(index % 4)}


def digest(value: Any) -> str:
    sha = hashlib.sha256()

    def walk(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            sha.update(node.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, dict):
            for key in node:
                sha.update(repr(key).encode())
                walk(node[key])
        elif isinstance(node, list | tuple):
            for item in node:
                walk(item)
        else:
            sha.update(repr(node).encode())

    walk(value)
    return sha.hexdigest()


def train(
    url: str,
    control: str,
    pace_s: float = 0.0,
    save_every: Any = "1 h",
    notice: str | None = None,
    place: str = "",
    stay_s: float = 60.0,
    save_at: tuple[int, ...] = (),
    wait_for_save: bool = True,
) -> None:
    """`pace_s`: the least a step takes. `save_at`: steps at whose end the script saves by itself."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    torch.set_num_threads(1)
    folder = Path(control)
    # A place in a step is one that nothing can be given up at.
    here = Place(folder, place, stay_s, compiling if place.startswith("compiling") else lambda s: time.sleep(0.005))
    tear_copies(here)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record: dict[str, Any] = {"samples": [], "evaluations": []}
    loader = DataLoader(Noisy(here), batch_size=BATCH, shuffle=True)

    def open_slow(where: str, *, options: Mapping[str, str] | None = None) -> Store:
        store = SlowStore(where.removeprefix("file://"))
        store.control = folder
        return store

    with holdfast.Run(url, save_every=save_every, keep=2, notice=notice, open_store=open_slow) as run:
        run.track(model=model, optimizer=optimizer, record=record)
        run.restore()
        here.at("restored")
        for epoch in run.epochs(EPOCHS):
            for batch in run.batches(loader):
                here.at(f"compiling:{run.step}")
                here.at(f"stepping:{run.step}")
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(batch["x"].float()), batch["y"])
                loss.backward()
                optimizer.step()
                record["samples"].extend(batch["index"].tolist())
                run.log(loss=loss)
                time.sleep(pace_s)
                if run.step + 1 in save_at:
                    run.save()
                if wait_for_save and run.step in save_at:
                    while not list(folder.glob("never")) and saving(run):
                        time.sleep(0.005)
            with run.evaluating():
                here.at(f"evaluating:{epoch}")
                record["evaluations"].append([epoch, model(torch.rand(8, WIDTH)).sum().item()])
    outcome = {
        "digest": digest([model.state_dict(), optimizer.state_dict(), record]),
        "samples": record["samples"],
        "rng": digest([torch.get_rng_state(), list(random.getstate()), np.random.get_state()[1].tolist()]),
    }
    (folder / "result.new").write_text(json.dumps(outcome))
    (folder / "result.new").replace(folder / "result.json")
    here.at("finished")


def saving(run: holdfast.Run) -> bool:
    saves = run._session.saves
    return saves is not None and saves.under_way() is not None


def tear_copies(here: Place) -> None:
    """Makes the copy of a snapshot stop in its middle, at the place `copying:STEP`."""
    whole = saver.stage

    def torn(flat: Any, layout: Any, slot: Any, *, step: int, **rest: Any) -> Any:
        half = layout.total_bytes // 2
        slot.memory[:half] = b"\xff" * half
        here.at(f"copying:{step}")
        return whole(flat, layout, slot, step=step, **rest)

    saver.stage = torn


if __name__ == "__main__":
    if sys.argv[1] == "--zygote":
        serve(train)
    else:
        train(**json.loads(sys.argv[1]))
