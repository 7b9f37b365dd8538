"""Makes the sample of format version 1 that is committed beside it: runs with every kind of value that a checkpoint can hold.

    python tests/format/make_fixture.py [FOLDER]          (default: tests/format/v1)

`source` has two checkpoints of which the second refers to bytes of the first; `fork` borrows the second one, and has one of its own
that refers to bytes in `source`; `ranks` has one of three ranks, with arrays in several parts. Names come from a seed and the clock
stands still, so the same code makes the same bytes. A sample is never made anew once it has been released: old formats must stay
readable. Another version of the format gets its own folder.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.read import restore_newest
from holdfast.checkpoint.retain import Keep, StoreOpener
from holdfast.checkpoint.runs.fork import fork
from holdfast.checkpoint.saver import Saver, SaveRequest, SaverOptions
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tree import FlatTree, flatten
from holdfast.checkpoint.write import put_root, write_part
from holdfast.core.events import NullSink
from holdfast.core.ids import TokenSource, seeded_tokens
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.train.opening import open_run

SOURCE, FORK, RANKS = "source", "fork", "ranks"
WORLD_SIZE = 3
_TORCH_DTYPES = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
)  # fmt: skip


class StoppedClock:
    """No time passes."""

    def monotonic_s(self) -> float:
        return 0.0

    def unix_s(self) -> float:
        return 1_750_000_000.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here waits")


def every_dtype() -> dict[str, torch.Tensor]:
    """Six bytes' worth of elements of every dtype, the same bits for each."""
    bits = torch.arange(96, dtype=torch.uint8) % 61
    return {
        str(dtype).removeprefix("torch."): (bits % 2).bool()[:6]
        if dtype is torch.bool
        else bits.view(dtype)[:6].clone()
        for dtype in _TORCH_DTYPES
    }


def every_value() -> dict[str, Any]:
    """One of every kind of value that is not an array."""
    return {
        "none": None, "true": True, "int": -7, "float": 0.1, "text": "zażółć", "list": [1, [2.5, "x"], {}], "empty": [],
        "big": 2**80, "exact": 2**53, "nan": float("nan"), "inf": float("-inf"), "negative_zero": -0.0,
        "surrogate": "a\ud800", "tuple": (1, (2, "b")), "set": {3, "three"}, "complex": complex(1.5, float("inf")),
        "bytes": b"\x00\xff", "bytearray": bytearray(b"ab"), "numbered": {0: "zero", -1: {"one": 1}}, "dollar": {"$": 1},
        "ordered": OrderedDict(b=1, a=2), "counter": Counter("aab"), "scalar": np.float32(0.1), "long_scalar": np.int64(-5),
        "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cpu"), "sla/sh~tilde": {"a/b": 1},
    }  # fmt: skip


def tree(step: int) -> dict[str, Any]:
    """The state at a step. What is `frozen` never changes, so later checkpoints refer to it."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) + step
    return {
        "tracked": {
            "model": {"emb.weight": weight, "head.weight": weight, "frozen": torch.arange(3000, dtype=torch.int32)},
            "optimizer": {
                "state": {0: {"exp_avg": weight * 0.5, "step": torch.tensor(float(step))}},
                "param_groups": [],
            },
            "dtypes": every_dtype(),
            "numpy": {"matrix": np.arange(6, dtype=np.float64).reshape(2, 3) * step, "scalar": np.array(step)},
            "shapes": {"empty": torch.zeros(0, 3), "same_key": {1: torch.ones(1), "1": torch.zeros(1)}},
            "values": every_value(),
        },
        "holdfast": {"step": step, "position": {"epoch": 1, "batch": step, "phase": 0}, "seed": 7},
    }


class Attempt:
    """What one training process does: open, claim, restore, save."""

    def __init__(self, store: Store, open_home: StoreOpener, tokens: TokenSource) -> None:
        clock = StoppedClock()
        claim = open_run(
            store, is_default_url=False, identity="0" * 64, fresh=False, extend=False, clock=clock, tokens=tokens,
            warn=lambda text: None,
        )  # fmt: skip
        assert claim.lineage is not None
        self._saver = Saver(
            store, claim.lineage, options=SaverOptions(keep=Keep(None), staging_cap_bytes=1 << 20, send_threads=1),
            open_home=open_home, clock=clock, tokens=tokens, sink=NullSink(),
        )  # fmt: skip
        head = claim.lineage.head
        reader = restore_newest(store, head, open_home, lambda reader: reader, fell_back=lambda fallback: None)
        if reader is not None:
            self._saver.known.add(reader.ref.name, *reader.parts, home=reader.ref.home)
            self._saver.roots.remember(reader.root)

    def save(self, step: int, state: dict[str, Any]) -> None:
        request = SaveRequest(
            flat=flatten(state), step=step, epoch=1, metadata={"step": step, "lr": [0.1]}, reason="sample",
            deferrable=lambda leaf: False,
        )  # fmt: skip
        handle = self._saver.save(request)
        self._saver.drain()
        handle.wait(0)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *unused: object) -> None:
        self._saver.close()


def make(folder: Path) -> None:
    """Write the runs below `folder`, which is emptied first."""
    tokens = seeded_tokens(1)
    stores = {name: MemoryStore(f"fixture-{name}") for name in (SOURCE, FORK, RANKS)}
    for store in stores.values():
        for entry in list(store.list()):
            store.delete(entry.key)
    with Attempt(stores[SOURCE], _home, tokens) as attempt:
        attempt.save(10, tree(10))
        attempt.save(20, tree(20))
    fork(stores[SOURCE].url, stores[FORK].url, open_home=_home, clock=StoppedClock(), tokens=tokens)
    with Attempt(stores[FORK], _home, tokens) as attempt:
        attempt.save(30, tree(30))
    make_ranks(stores[RANKS], seeded_tokens(2))
    shutil.rmtree(folder, ignore_errors=True)
    for name, store in stores.items():
        for entry in list(store.list()):
            path = folder / name / entry.key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(entry.key, max_bytes=1 << 20))


def ranks_tree(rank: int) -> dict[str, Any]:
    """The state of one of three ranks. All have the same `model`; `noise` is each one's own."""
    matrix = np.arange(35, dtype=np.float32).reshape(7, 5)
    model = {
        "rows": matrix, "columns": matrix * 2, "tiles": torch.arange(36).reshape(6, 6).to(torch.bfloat16),
        "narrow": torch.arange(2, dtype=torch.float64), "scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4),
        "tied": matrix,
    }  # fmt: skip
    own = {"position": {"step": 10}, "rng": {"noise": torch.arange(rank + 1), "rank": rank}}
    return {"tracked": {"model": model}, "holdfast": own}


def _rectangles(rank: int) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """What a rank writes of the arrays that all have: (offsets, shape). One rank has nothing of `narrow`, one writes two tiles."""
    rows, columns = [(0, 3), (3, 2), (5, 2)][rank], [(0, 2), (2, 2), (4, 1)][rank]
    tiles = [[((0, 0), (2, 6))], [((2, 0), (4, 1))], [((2, 1), (4, 5))]][rank]
    return {
        "rows": [((rows[0], 0), (rows[1], 5))], "columns": [((0, columns[0]), (7, columns[1]))], "tiles": tiles,
        "narrow": [((rank,), (1,))] if rank < 2 else [], "scalar": [((), ())] if rank == 1 else [],
        "empty": [((0, 0), (0, 4))] if rank == 2 else [],
    }  # fmt: skip


def make_ranks(store: Store, tokens: TokenSource) -> None:
    """One checkpoint by three ranks, without processes."""
    claim = open_run(
        store, is_default_url=False, identity="0" * 64, fresh=False, extend=False, clock=StoppedClock(), tokens=tokens,
        warn=lambda text: None,
    )  # fmt: skip
    assert claim.lineage is not None
    name, written = f"checkpoints/00000002-1-{tokens()}", []
    with ThreadPoolExecutor(1) as pool:
        for rank in range(WORLD_SIZE):
            flat = _part_of(rank)
            part, _ = write_part(
                stream(flat, lay_out(flat), step=10, epoch=0, metadata={}), store, name=name, rank=rank, attempt=1,
                known=KnownChunks(), tokens=tokens, hashing=pool, sending=pool, uploaded=set(),
            )  # fmt: skip
            written.append(part)
    _, root_blake3 = put_root(store, claim.record.run_id, name, written, {"step": 10})
    ref = CheckpointRef(
        name=name, root_blake3=root_blake3, step=10, epoch=0, generation=1, attempt=1, unix_s=StoppedClock().unix_s(),
        total_bytes=sum(part.total_bytes for part in written),
    )  # fmt: skip
    claim.lineage.advance("save", lambda head: msgspec.structs.replace(head, checkpoints=[ref]))


def _part_of(rank: int) -> FlatTree:
    flat = flatten(ranks_tree(rank), rank=rank, is_own=lambda path, value: path.startswith("holdfast"))
    leaves = []
    for leaf in flat.leaves:
        rectangles = _rectangles(rank).get(leaf.name.rpartition("/")[2])
        if rectangles is None:
            leaves.append(leaf)
        for offsets, shape in rectangles or []:
            held = leaf.value[tuple(slice(a, a + n) for a, n in zip(offsets, shape, strict=True))]
            leaves.append(leaf._replace(value=held, spec=leaf.spec._replace(shape=shape, offsets=offsets)))
    return FlatTree(flat.document, tuple(leaves))


def _home(url: str) -> Store:
    return MemoryStore(url.removeprefix("memory://"))


def folders(folder: Path) -> dict[str, Path]:
    """Where the runs of a sample lie, by the URLs that are in it."""
    return {f"memory://fixture-{name}": folder / name for name in (SOURCE, FORK, RANKS)}


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "v1")
