"""Whose is the URL, and may this agent keep a folder there?"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from holdfast.checkpoint.format import Head
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.record import open_record
from holdfast.core.clock import Clock
from holdfast.core.errors import DifferentRun, RunRemoved
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import digest
from holdfast.store.base import Store

__all__ = ["MIRROR_IDENTITY", "claim_mirror"]

MIRROR_IDENTITY = digest(b"holdfast mirror 1")
"""The identity of every run that is a mirror: what a trainer has saved is never taken for one."""


def claim_mirror(
    store: Store, *, fresh: bool, clock: Clock, tokens: TokenSource, warn: Callable[[str], None]
) -> Lineage:
    """Become the run's owner. `fresh` begins a new generation, in which nothing is restored.

    Raises DifferentRun when something else than a mirror was saved there, RunRemoved, StoreUnsafe, Fenced, and what the store
    raises.
    """
    record = open_record(store, clock=clock, tokens=tokens, warn=warn)
    truth = read_truth(store, record.run_id)
    for problem in truth.altered:
        warn(f"a head does not verify and is passed over: {problem}")
    head = truth.head
    if head is not None and not fresh:
        if head.removed:
            raise RunRemoved(
                f"{store.url}: this run has been removed. Start over here with --fresh, or use another URL"
            )
        if head.checkpoints and head.identity not in ("", MIRROR_IDENTITY):
            raise DifferentRun(
                f"{store.url}: a training that uses holdfast has its checkpoints here, which are not a mirrored folder. Leave "
                "--mirror out for it, give the mirror a URL of its own, or start over here with --fresh"
            )

    def begin(body: Head) -> Head:
        generation = body.generation + 1 if fresh and body.number else body.generation
        return msgspec.structs.replace(body, identity=MIRROR_IDENTITY, generation=generation)

    lineage = Lineage(store, record.run_id, clock=clock, tokens=tokens)
    lineage.claim(begin, revive=fresh)
    return lineage
