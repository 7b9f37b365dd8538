"""The drill as a pytest fixture, for users' own tests:

    def test_my_training(drill):
        drill([sys.executable, "train.py"], scenarios=["kill", "torn"], times=1).check()

Loaded by pytest as a plugin wherever holdfast is installed, so it imports nothing before the fixture is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from holdfast.drill.report import DrillReport

__all__ = ["Drill", "drill"]


class Drill(Protocol):
    """Plays scenarios (all, when none are named) on a command; `.check()` of the result raises AssertionError with every fault."""

    def __call__(
        self,
        command: Sequence[str],
        *,
        scenarios: Sequence[str] = (),
        times: int = 1,
        tolerance: float | None = None,
        seed: int = 0,
        here: bool = False,
    ) -> DrillReport: ...


@pytest.fixture
def drill() -> Drill:
    """Interrupts a training script on purpose and compares what comes out; nothing stays behind."""

    def play(
        command: Sequence[str],
        *,
        scenarios: Sequence[str] = (),
        times: int = 1,
        tolerance: float | None = None,
        seed: int = 0,
        here: bool = False,
    ) -> DrillReport:
        import os

        from holdfast.core.clock import SystemClock
        from holdfast.drill.conduct import DrillOptions, conduct

        options = DrillOptions(scenarios=tuple(scenarios), times=times, tolerance=tolerance, seed=seed, here=here)
        return conduct(command, options, clock=SystemClock(), environment=os.environ)

    return play
