"""Runs to export from, and short ways to export and import with a stopped clock and seeded names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from make_fixture import Attempt, StoppedClock, tree
from same_bits import read_by_holdfast

from holdfast.checkpoint.exchange.adopt import AnyFormat, Imported, import_checkpoint
from holdfast.checkpoint.exchange.export import Exported, export_checkpoint
from holdfast.checkpoint.exchange.note import Format
from holdfast.checkpoint.heads import read_truth
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.store.open import open_store

__all__ = ["common_state", "export", "import_", "newest", "trained"]


def common_state(step: int) -> dict[str, Any]:
    """Every kind of value that all formats can hold: safetensors has no such dtype, and DCP turns keys into text."""
    state = tree(step)
    del state["tracked"]["dtypes"]["complex128"]
    del state["tracked"]["shapes"]["same_key"]["1"]
    return state


def trained(folder: Path, *states: dict[str, Any]) -> Store:
    """A run in `folder` with a checkpoint of each state, steps 1, 2, …"""
    store = LocalStore(folder)
    with Attempt(store, open_store, seeded_tokens(1)) as attempt:
        for step, state in enumerate(states, start=1):
            attempt.save(step, state)
    return store


def export(store: Store, out: Path, format: Format, **options: Any) -> Exported:
    return export_checkpoint(store, out, format, open_home=open_store, tokens=seeded_tokens(2), **options)


def import_(
    source: Path, format: AnyFormat = "auto", *, into: Store | None = None, **options: Any
) -> tuple[Imported, Store]:
    store = into or MemoryStore()
    done = import_checkpoint(store, source, format, clock=StoppedClock(), tokens=seeded_tokens(3), **options)
    return done, store


def newest(store: Store) -> Any:
    """The state in a run's newest checkpoint, verified."""
    head = read_truth(store).head
    assert head is not None
    return read_by_holdfast(store, head.checkpoints[-1], open_store)
