"""The process that forks victims (tests/support/forking.py), whose victims save by way of a disk to a store that is slow."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "kills"))
sys.path.append(str(Path(__file__).parents[1] / "support"))

import victim
from forking import serve

import holdfast
from holdfast.checkpoint import two_tiers
from holdfast.checkpoint.tier import LocalTier
from holdfast.core.clock import SystemClock
from holdfast.store.base import Store
from holdfast.store.open import open_store
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation

two_tiers._LINGER_S = 0.2
_train = victim.train


def _plan(operation: Operation) -> Fault | None:
    bulky = operation.method == "put" and operation.key.startswith(("data/", "checkpoints/"))
    return Fault.SLOW if bulky else None


def _slowly(url: str, *, options: Mapping[str, str] | None = None, slow_s: float) -> Store:
    return FaultyStore(open_store(url, options=options), _plan, clock=SystemClock(), slow_s=slow_s)


def _take_time(step: int, figures: Mapping[str, float]) -> None:
    """Called for every `run.log`: steps that take as long as it takes to stage the state."""
    time.sleep(0.01)


def train(local: str = "", slow_s: float = 0.0, outlives: bool = False, **rest: Any) -> None:
    """As the victim does, with these."""
    if local:
        run = partial(
            holdfast.Run, local=LocalTier(local, outlives=outlives), open_store=partial(_slowly, slow_s=slow_s),
            loggers=[_take_time],
        )  # fmt: skip
        vars(victim)["holdfast"] = SimpleNamespace(Run=run)
    _train(**rest)


if __name__ == "__main__":
    serve(train)
