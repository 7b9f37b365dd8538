"""Lets these tests import the modules that stand beside them and those of the checkpoint's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "checkpoint")]


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 bytes, at most five in an object, so that small states share and split objects; old heads pruned at once."""
    from holdfast.checkpoint import heads, pack, write

    monkeypatch.setattr(write, "CHUNK_BYTES", 32)
    monkeypatch.setattr(pack, "OBJECT_BYTES", 160)
    monkeypatch.setattr(heads, "HEADS_KEPT", 1)
