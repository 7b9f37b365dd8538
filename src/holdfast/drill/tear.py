"""Damage to a checkpoint, as torn uploads and turned bits do it: one object that only the newest checkpoint needs."""

from __future__ import annotations

from pathlib import Path

from holdfast.checkpoint.retain import checkpoint_keys, read_root
from holdfast.checkpoint.runs.inspect import current_checkpoints, read_run
from holdfast.store.local import LocalStore

__all__ = ["tear_newest"]


def tear_newest(run: Path, *, flip: bool) -> str | None:
    """Turn one bit of an object of the newest checkpoint, or cut it in half. Says what was done; None where there is no checkpoint
    before it, or no object of its own."""
    store = LocalStore(run)
    refs = current_checkpoints(read_run(store).head)
    if len(refs) < 2:
        return None
    newest, before = (checkpoint_keys(ref, read_root(store, ref)) for ref in (refs[-1], refs[-2]))
    # The largest holds the tensors, if it holds any that are new.
    own = sorted(newest - before, key=lambda key: (run / key).stat().st_size)
    if not own:
        return None
    path = run / own[-1]
    data = bytearray(path.read_bytes())
    if flip:
        data[len(data) // 2] ^= 1
    else:
        del data[len(data) // 2 :]
    path.chmod(0o600)
    path.write_bytes(data)
    what = "one bit turned" if flip else "cut in half"
    return f"checkpoint of step {refs[-1].step}: {what}, {own[-1].partition('/')[0]} object"
