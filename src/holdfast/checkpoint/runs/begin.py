"""The first claim on a URL where nothing has been trained yet: whoever fills a run from outside begins here."""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.format import Head
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.record import open_record
from holdfast.core.clock import Clock
from holdfast.core.errors import RunConflict
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["check_empty", "claim_empty"]


def check_empty(head: Head | None, url: str) -> None:
    """Raises RunConflict when there is something to lose. A claim that never came to a checkpoint leaves a URL empty."""
    if head is None:
        return
    if head.removed:
        raise RunConflict(f"{url}: a run that has been removed stood here; use another URL")
    if head.checkpoints or head.finished:
        raise RunConflict(f"{url}: there is a run with checkpoints already; use a URL of its own")


def claim_empty(store: Store, *, clock: Clock, tokens: TokenSource) -> Lineage:
    """Own an empty URL: a new run, or a new generation of one that never came to a checkpoint.

    Raises RunConflict when it is not empty, Fenced when somebody else was faster, StoreUnsafe, and what the store raises.
    """
    check_empty(read_truth(store).head, store.url)

    def begin(body: Head) -> Head:
        check_empty(body, store.url)
        return msgspec.structs.replace(body, generation=body.generation + 1) if body.number else body

    lineage = Lineage(store, open_record(store, clock=clock, tokens=tokens).run_id, clock=clock, tokens=tokens)
    lineage.claim(begin)
    return lineage
