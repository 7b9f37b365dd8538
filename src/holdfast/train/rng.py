"""The global random generators of the process: python, numpy, torch on the CPU and on every CUDA device.

They are part of every checkpoint without being asked for, so that dropout, shuffles and noise go on as if nothing had happened.
Each rank saves its own and gets them back. In a world of another size nobody's stream goes on, so each rank begins a new one,
seeded by arithmetic that depends on nothing but (seed, world size, rank, step): the same resume gives the same numbers, and no
two ranks share theirs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from holdfast.data.seeds import derive_seed

__all__ = ["capture_rng", "preserved_rng", "restore_rng", "seed_rng"]


def capture_rng() -> dict[str, Any]:
    """The state of every global generator. Does not initialise CUDA where the program has not used it."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())] if _cuda_in_use() else []
    return {
        "python": {"version": version, "words": np.asarray(words, dtype=np.uint32), "gauss": gauss},
        "numpy": {
            "name": str(name), "keys": np.asarray(keys), "position": int(position),
            "has_gauss": int(has_gauss), "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }  # fmt: skip


def restore_rng(state: dict[str, Any]) -> list[str]:
    """Set every global generator. Returns a line for each that could not be set because the hardware differs."""
    python = state["python"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
    np_state = state["numpy"]
    np.random.set_state(
        (np_state["name"], np_state["keys"], np_state["position"], np_state["has_gauss"], np_state["cached"])
    )
    torch.set_rng_state(state["torch"])
    saved, present = len(state["cuda"]), torch.cuda.device_count()
    for device in range(min(saved, present)):
        torch.cuda.set_rng_state(state["cuda"][device], device)
    if saved != present and (saved or _cuda_in_use()):
        return [f"random state of {saved} CUDA devices was saved, {present} are here: theirs goes on from its own seed"]
    return []


def seed_rng(seed: int, *, world_size: int, rank: int, step: int) -> None:
    """Begin new streams: each library is seeded with n = derive_seed(seed, "generators", world_size, rank, step, its name); see
    data/seeds.py. python: random.seed(n); numpy: its two 32-bit halves, low first; torch, on every device: manual_seed(n).

    Numbers of their own, because python and numpy would make the same stream of the same one.
    """
    python, numpy, every_device = (
        derive_seed(seed, "generators", world_size, rank, step, name) for name in ("python", "numpy", "torch")
    )
    random.seed(python)
    np.random.seed([numpy & 0xFFFFFFFF, numpy >> 32])
    torch.manual_seed(every_device)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever happens inside leaves the global generators as they were."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
