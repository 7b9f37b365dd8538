"""Lets these tests import the modules that stand beside them and those of the checkpoint's and the power cut's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(_TESTS / "checkpoint"), str(_TESTS / "power"), str(_TESTS / "kills")]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 bytes, at most five in an object, so that small states share and split objects."""
    from holdfast.checkpoint import pack, write

    monkeypatch.setattr(write, "CHUNK_BYTES", 32)
    monkeypatch.setattr(pack, "OBJECT_BYTES", 160)


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that the kernel has, so flushing only takes time."""
    import os

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def quiet_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process is played by threads, its end shows in each of them; only that is no news."""
    import threading

    from interleaved import Dead

    loud = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, Dead):
            loud(args)

    monkeypatch.setattr(threading, "excepthook", hook)
