"""Going back to an older checkpoint, and dropping single ones.

Both take the run over: the head that drops the checkpoints is itself the claim, so there is one moment at which it happens, a
running trainer is fenced by it, and a crash leaves either the old truth or the new one. What nothing reaches any more is
condemned by that head and swept after it has been confirmed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.retain import Roots, StoreOpener, condemn, sweep
from holdfast.checkpoint.runs.inspect import current_checkpoints, find_checkpoint, freed_bytes, read_run
from holdfast.checkpoint.runs.verify import Progress, verify
from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, RunConflict, RunRemoved, UsageError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["Dropping", "drop", "plan_drop", "plan_rollback", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropping:
    """What is (or would be) taken away. `target` is the checkpoint that the run goes on from; None where that does not change.

    `freed_bytes` come back unless a fork still refers to them. `head` is the number of the head that did it, 0 for a plan;
    `deleted_objects` is how many objects the sweep removed.
    """

    url: str
    target: CheckpointRef | None
    dropped: tuple[CheckpointRef, ...]
    freed_bytes: int
    was_finished: bool
    head: int = 0
    deleted_objects: int = 0


def plan_rollback(store: Store, to_step: str | int) -> Dropping:
    """What a rollback would drop; nothing is changed and nothing verified. Raises UsageError when there is nothing to go back
    from."""
    head = _live_head(store)
    target = find_checkpoint(head, to_step, url=store.url)
    later = _later(head, target, store.url)
    if not later and not head.finished:
        raise UsageError(
            f"{store.url}: step {target.step} is already the newest checkpoint; there is nothing to roll back"
        )
    return Dropping(
        url=store.url, target=target, dropped=tuple(later), freed_bytes=freed_bytes(store, head, later),
        was_finished=head.finished,
    )  # fmt: skip


def rollback(
    store: Store,
    to_step: str | int,
    *,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Dropping:
    """Make the checkpoint of `to_step` the newest of its run, and the run unfinished. Later checkpoints are condemned and swept.

    The target is verified first, every byte of it; with `dry_run` nothing else happens. A trainer that runs on it is fenced: it
    stops at its next save. Raises UsageError when there is no such checkpoint in the current generation, IntegrityError when it
    does not verify, RunConflict when retention dropped it meanwhile, Fenced when a trainer claimed the run at the same moment.
    """
    plan = plan_rollback(store, to_step)
    target = find_checkpoint(_live_head(store), to_step, url=store.url)
    verdict = verify(store, target.name, open_home=open_home, progress=progress).checkpoints[0]
    if verdict.status == "dropped":
        raise _gone(store.url, target)
    if verdict.problems:
        reasons = "; ".join(f"{problem.key}: {problem.detail}" for problem in verdict.problems)
        raise IntegrityError(
            f"{store.url}: the checkpoint of step {target.step} does not verify ({reasons}); nothing was changed"
        )
    if dry_run:
        return plan

    def retained(current: Head) -> list[CheckpointRef]:
        gone = {ref.name for ref in _later(current, target, store.url)}
        return [ref for ref in current.checkpoints if ref.name not in gone]

    return _take_over(store, "rollback", retained, lambda seen: False, target, open_home, clock, tokens)


def plan_drop(store: Store, which: str | int) -> Dropping:
    """What dropping one checkpoint would free. Raises UsageError for the only checkpoint that the run could go on from."""
    head = _live_head(store)
    ref = find_checkpoint(head, which, url=store.url)
    current = current_checkpoints(head)
    if current == [ref]:
        raise UsageError(
            f"{store.url}: step {ref.step} is the only checkpoint of this run; without it training would start from nothing. "
            "Remove the whole run instead, or begin anew with fresh=True"
        )
    return Dropping(
        url=store.url, target=current[-2] if current[-1] == ref else None, dropped=(ref,),
        freed_bytes=freed_bytes(store, head, [ref]), was_finished=head.finished,
    )  # fmt: skip


def drop(store: Store, which: str | int, *, open_home: StoreOpener, clock: Clock, tokens: TokenSource) -> Dropping:
    """Remove one checkpoint. The run stays finished if it was, unless its newest checkpoint is the one that goes.

    A trainer that runs on it is fenced. Raises as `rollback` does.
    """
    plan = plan_drop(store, which)
    name = plan.dropped[0].name

    def retained(current: Head) -> list[CheckpointRef]:
        kept = [ref for ref in current.checkpoints if ref.name != name]
        if len(kept) == len(current.checkpoints) or not any(ref.generation == current.generation for ref in kept):
            raise RunConflict(f"{store.url}: the run's checkpoints have changed meanwhile; look again and repeat")
        return kept

    return _take_over(
        store, "drop", retained, lambda seen: seen.finished and seen.checkpoints[-1].name != name, plan.target,
        open_home, clock, tokens,
    )  # fmt: skip


def _live_head(store: Store) -> Head:
    head = read_run(store).head
    if head.removed:
        raise RunRemoved(f"{store.url}: this run has been removed; there is nothing left to change")
    return head


def _later(head: Head, target: CheckpointRef, url: str) -> list[CheckpointRef]:
    current = current_checkpoints(head)
    names = [ref.name for ref in current]
    if target.name not in names:
        if any(ref.name == target.name for ref in head.checkpoints):
            raise UsageError(
                f"{url}: step {target.step} belongs to generation {target.generation}, which a fresh start has left behind "
                f"(now {head.generation}). Fork it into a run of its own instead"
            )
        raise _gone(url, target)
    return current[names.index(target.name) + 1 :]


def _gone(url: str, target: CheckpointRef) -> RunConflict:
    return RunConflict(f"{url}: retention dropped the checkpoint of step {target.step} meanwhile; nothing was changed")


def _take_over(
    store: Store,
    kind: str,
    retained: Callable[[Head], list[CheckpointRef]],
    finished: Callable[[Head], bool],
    target: CheckpointRef | None,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
) -> Dropping:
    """Claim with a head that retains what `retained` says, then sweep. Nothing is written when `retained` raises."""
    roots = Roots(store, open_home)
    before: list[Head] = []
    was_finished = False

    def change(body: Head) -> Head:
        # The claim has already cleared `finished` in `body`. If the truth has moved on since, the put loses and this runs again.
        nonlocal was_finished
        seen = read_truth(store, body.run_id).head or body
        before[:], was_finished = [body], seen.finished
        following = condemn(body, retained(body), roots)
        return msgspec.structs.replace(following, kind=kind, finished=finished(seen))

    lineage = Lineage(store, read_run(store).head.run_id, clock=clock, tokens=tokens)
    head = lineage.claim(change)
    kept = {ref.name for ref in head.checkpoints}
    dropped = tuple(ref for ref in before[0].checkpoints if ref.name not in kept)
    freed = freed_bytes(store, before[0], dropped)
    deleted = sweep(store, lineage, open_home)
    return Dropping(
        url=store.url, target=target, dropped=dropped, freed_bytes=freed, was_finished=was_finished, head=head.number,
        deleted_objects=len(deleted),
    )  # fmt: skip
