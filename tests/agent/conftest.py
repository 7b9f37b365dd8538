"""Lets these tests import the modules that stand beside them; machines whose folders are mirrored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mirror_parts import Begin, Machine


@pytest.fixture
def begin() -> Iterator[Begin]:
    machines: list[Machine] = []

    def start(*arguments: object, **keywords: object) -> Machine:
        machines.append(Machine(*arguments, **keywords))  # type: ignore[arg-type]
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "machine").mkdir()
    return tmp_path / "machine" / "out"
