"""Commit what a trainer that has died left on this machine's disk: the second half of a two-tier save, done by another process."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.retain import Keep, StoreOpener
from holdfast.checkpoint.runs.inspect import read_run
from holdfast.checkpoint.tier import LocalTier, Staged, Tier, keys_of
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, StoreUnavailable, UsageError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["find_staged", "promote_staged"]

_THREADS = 4


class _NothingToPromote(Exception):
    """Somebody has committed, or gone back, in the moment before the claim: so there is none."""


def find_staged(store: Store, local: LocalTier) -> CheckpointRef | None:
    """What `promote_staged` would commit: the newest checkpoint on the disk that continues the run, if there is one."""
    head = read_run(store).head
    tier = Tier(local, head.run_id)
    try:
        return next((staged.ref for staged in _promotable(tier, store, head)), None)
    finally:
        tier.close()


def promote_staged(
    store: Store, local: LocalTier, *, open_home: StoreOpener, clock: Clock, tokens: TokenSource
) -> CheckpointRef | None:
    """Commit the newest checkpoint that lies on the disk, continues the run and verifies; None when none continues it (any more).

    Claims the run, so a trainer of it elsewhere is fenced; where nothing continues the run, nobody is. Raises UsageError when a
    trainer of it is alive on this machine, IntegrityError when the disk has altered what it holds, StoreUnavailable when it does
    not work, and what the store raises.
    """
    run = read_run(store)
    tier = Tier(local, run.head.run_id)
    if not any(_promotable(tier, store, run.head)):
        tier.close()
        return None
    try:
        _hold(tier)

        def change(body: Head) -> Head:
            if not any(_promotable(tier, store, body)):
                raise _NothingToPromote
            return body

        lineage = Lineage(store, run.head.run_id, clock=clock, tokens=tokens)
        head = lineage.claim(change)
        return _commit_first(_promotable(tier, store, head), tier, store, lineage, open_home, clock, tokens)
    except _NothingToPromote:
        return None
    finally:
        tier.close()


def _promotable(tier: Tier, store: Store, head: Head) -> Iterable[Staged]:
    return (staged for staged in tier.candidates(store, head) if staged.may_commit)


def _hold(tier: Tier) -> None:
    try:
        if tier.hold():
            return
    except OSError as error:
        raise StoreUnavailable(f"{tier.folder}: the disk does not work: {error}") from error
    raise UsageError(
        f"{tier.folder}: a process of this run is alive on this machine and sends its checkpoints itself; stop it first"
    )


def _commit_first(
    candidates: Iterable[Staged],
    tier: Tier,
    store: Store,
    lineage: Lineage,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
) -> CheckpointRef:
    """Of those that verify; then the disk holds nothing else. Raises what is wrong with the last one when none does."""
    wrong: IntegrityError | None = None
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-send") as pool:
        committer = Committer(
            store, lineage, keep=Keep(last=None), open_home=open_home, clock=clock, tokens=tokens, hashing=pool,
            sending=pool,
        )  # fmt: skip
        for staged in candidates:
            try:
                ref = committer.promote(staged, tier).ref
            except IntegrityError as error:
                wrong = error
                continue
            with suppress(HoldfastError):
                tier.keep_only(keys_of(staged))
            return ref
    raise IntegrityError(f"nothing was committed: {wrong}") from wrong
