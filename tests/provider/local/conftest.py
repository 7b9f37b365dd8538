"""Rehearsal clouds for tests: each in a folder of its own, and none leaves a process behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rehearsal import Rehearsal, Rehearse


@pytest.fixture
def rehearse(tmp_path: Path) -> Iterator[Rehearse]:
    """Start a cloud with these settings; it is ended after the test, and nothing of it may be left."""
    started: list[Rehearsal] = []

    def start(**config: Any) -> Rehearsal:
        folder = tmp_path / f"rehearsal-{len(started)}"
        folder.mkdir()
        started.append(Rehearsal(folder, config))
        return started[-1]

    yield start
    for rehearsal in started:
        rehearsal.end()
