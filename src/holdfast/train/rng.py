"""The global random generators of the process: python, numpy, torch on the CPU and on every CUDA device.

They are part of every checkpoint without being asked for, so that dropout, shuffles and noise go on as if nothing had happened.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["capture_rng", "preserved_rng", "restore_rng"]


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
