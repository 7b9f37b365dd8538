"""What the tests of saving and restoring share: a claimed run with a saver, and the way back from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from interleaved import RUN_ID, FakeClock, load_tree, no_home

from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import CheckpointReader, Fallback, restore_newest
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import Saver, SaveRequest, SaverOptions
from holdfast.checkpoint.tree import flatten
from holdfast.core.events import CollectingSink
from holdfast.core.ids import TokenSource, random_token
from holdfast.store.base import Store


def request(state: Any, step: int, *, reason: str = "test", finish: bool = False) -> SaveRequest:
    return SaveRequest(
        flat=flatten(state), step=step, epoch=0, metadata={"step": step}, reason=reason,
        deferrable=lambda leaf: False, finish=finish,
    )  # fmt: skip


@dataclass
class Attempt:
    """One claim of a run with its saver."""

    store: Store
    lineage: Lineage
    saver: Saver
    sink: CollectingSink
    fallbacks: list[Fallback] = field(default_factory=list)

    def save(self, state: Any, step: int) -> None:
        """Save, and wait until it is committed and swept."""
        self.saver.save(request(state, step)).wait(60)
        self.saver.drain(60)


def begin(
    store: Store, *, options: SaverOptions | None = None, tokens: TokenSource = random_token,
    committed: Callable[[Any], None] = lambda ref: None,
) -> Attempt:  # fmt: skip
    clock, sink = FakeClock(), CollectingSink()
    lineage = Lineage(store, RUN_ID, clock=clock, tokens=tokens)
    lineage.claim()
    saver = Saver(
        store, lineage, options=options or SaverOptions(keep=Keep(2)), open_home=no_home, clock=clock, tokens=tokens,
        sink=sink, committed=committed,
    )  # fmt: skip
    return Attempt(store, lineage, saver, sink)


def resume(attempt: Attempt) -> Any:
    """Restore as training does, and tell the saver what need not be sent again. None where there is no checkpoint."""
    found = restore_newest(
        attempt.store, attempt.lineage.head, no_home, lambda reader: (reader, load_tree(reader)),
        fell_back=attempt.fallbacks.append,
    )  # fmt: skip
    if found is None:
        return None
    reader, tree = found
    attempt.saver.known.add(reader.ref.name, *reader.parts, home=None)
    attempt.saver.roots.remember(reader.root)
    return tree


def restore(store: Store, fallbacks: list[Fallback] | None = None) -> Any:
    """The newest state, read from outside; None where there is none."""

    def load(reader: CheckpointReader) -> Any:
        return load_tree(reader)

    head = read_truth(store, RUN_ID).head
    if head is None:
        return None
    passed_over = fallbacks if fallbacks is not None else []
    return restore_newest(store, head, no_home, load, fell_back=passed_over.append)


def garbage(store: Store) -> set[str]:
    """Data and checkpoint objects that the newest head does not reach."""
    from holdfast.checkpoint.retain import checkpoint_keys, read_root

    head = read_truth(store, RUN_ID).head
    assert head is not None
    reached = {key for ref in head.checkpoints for key in checkpoint_keys(ref, read_root(store, ref))}
    stored = {entry.key for prefix in ("data/", "checkpoints/") for entry in store.list(prefix)}
    assert reached <= stored
    return stored - reached
