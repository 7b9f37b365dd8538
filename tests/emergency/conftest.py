"""A warmed process that forks trainings, and what an undisturbed one comes to. Lets these tests import what stands beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from forking import Zygote
from grounds import Ground
from trainer import EPOCHS, SAMPLES


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote(Path(__file__).parent / "trainer.py", "--zygote") as process:
        yield process


@pytest.fixture(scope="session")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = Ground(zygote, tmp_path_factory.mktemp("reference")).finish()
    for start in range(0, EPOCHS * SAMPLES, SAMPLES):
        assert sorted(outcome["samples"][start : start + SAMPLES]) == list(range(SAMPLES))
    return outcome
