"""Looking at a run from outside: which checkpoints it has, what each of them holds, and what storage each of them costs.

Nothing here writes, and nothing here reads tensor data: heads, roots, parts and listings only. What people then do to a run starts
from the same reading: verify.py, rollback.py, fork.py, remove.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.format import CheckpointRef, Head, PinnedBy, Root, RunRecord
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import CheckpointReader, open_checkpoint
from holdfast.checkpoint.record import read_record
from holdfast.checkpoint.retain import StoreOpener, checkpoint_keys, read_root
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, UsageError
from holdfast.core.sealed import FORMAT_VERSION, MAX_RECORD_BYTES, unseal
from holdfast.store.base import Store

__all__ = [
    "ArrayLine",
    "Change",
    "CheckpointDetails",
    "CheckpointLine",
    "ForkLine",
    "ObjectLine",
    "RunListing",
    "RunState",
    "current_checkpoints",
    "find_checkpoint",
    "freed_bytes",
    "list_checkpoints",
    "list_forks",
    "metadata_changes",
    "read_run",
    "show",
    "stored_sizes",
]

_SHOWN_STEPS = 12


@dataclass(frozen=True, slots=True)
class RunState:
    """What stands at a URL. `altered` says which records do not verify and were passed over."""

    record: RunRecord
    head: Head
    altered: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLine:
    """One retained checkpoint. `own_bytes` is what the store would get back if it were dropped: stored bytes that no other
    retained checkpoint reaches; None when its root cannot be read. `home` is the run that a fork borrows it from."""

    name: str
    step: int
    epoch: int
    generation: int
    attempt: int
    unix_s: float
    age_s: float
    total_bytes: int
    own_bytes: int | None
    home: str | None


@dataclass(frozen=True, slots=True)
class ForkLine:
    """Another run that refers to a checkpoint of this one; `pin` is the object that says so."""

    target: str
    step: int
    checkpoint: str
    pin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunListing:
    """A run as `holdfast checkpoints ls` shows it. `unreached_bytes` are stored but belong to no retained checkpoint: they wait for
    a sweep, are being written, or are kept for forks. Checkpoints are in the order in which they were made."""

    url: str
    run_id: str
    name: str
    created_unix_s: float
    head: int
    attempt: int
    generation: int
    finished: bool
    removed: bool
    checkpoints: tuple[CheckpointLine, ...]
    forks: tuple[ForkLine, ...]
    stored_bytes: int
    unreached_bytes: int
    altered: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArrayLine:
    """One array of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    library: str


@dataclass(frozen=True, slots=True)
class ObjectLine:
    """One data object that a checkpoint reads from. `live_bytes` of it are this checkpoint's; `home` is None for the run's own."""

    key: str
    home: str | None
    size_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True)
class Change:
    """A value of the metadata that differs from the checkpoint before."""

    path: str
    before: Any
    now: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDetails:
    """A checkpoint as `holdfast checkpoints show` shows it.

    `total_bytes` is the size of the state; of the bytes that it reads, `new_bytes` lie in objects that the checkpoint before
    does not read, `shared_bytes` in objects that it does, and `borrowed_bytes` (also counted in one of the two) in other runs.
    """

    url: str
    checkpoint: CheckpointLine
    newest: bool
    metadata: Mapping[str, Any]
    arrays: tuple[ArrayLine, ...]
    objects: tuple[ObjectLine, ...]
    total_bytes: int
    new_bytes: int
    shared_bytes: int
    borrowed_bytes: int
    previous: str | None
    changes: tuple[Change, ...]


def read_run(store: Store) -> RunState:
    """The run's record and its newest head that verifies.

    Raises UsageError when there is no run at the URL, IntegrityError when there is one but no head verifies.
    """
    altered: list[str] = []
    record: RunRecord | None = None
    try:
        record = read_record(store)
    except NotFound:
        pass
    except IntegrityError as error:
        altered.append(str(error))
    truth = read_truth(store, record.run_id if record else None)
    altered.extend(truth.altered)
    if truth.head is None:
        if truth.highest:
            raise IntegrityError(f"{store.url}: none of the run's heads verifies: {'; '.join(truth.altered)}")
        raise UsageError(f"{store.url}: there is no run here; check the URL")
    if record is None:
        record = RunRecord(format=FORMAT_VERSION, run_id=truth.head.run_id, created_unix_s=0.0, name="")
    return RunState(record, truth.head, tuple(altered))


def current_checkpoints(head: Head) -> list[CheckpointRef]:
    """The checkpoints that a restore would look at, oldest first."""
    return [ref for ref in head.checkpoints if ref.generation == head.generation]


def find_checkpoint(head: Head, which: str | int = "latest", *, url: str) -> CheckpointRef:
    """The retained checkpoint that a person means: `"latest"`, a step, or a name (its last component is enough).

    Where several have the step, the newest of the current generation is meant, then the newest of the others. Raises UsageError
    that lists what there is.
    """
    newest_first = current_checkpoints(head)[::-1]
    if which == "latest":
        matching = newest_first
    elif isinstance(which, int) or which.isdecimal():
        newest_first += [ref for ref in reversed(head.checkpoints) if ref.generation != head.generation]
        matching = [ref for ref in newest_first if ref.step == int(which)]
    else:
        matching = [ref for ref in head.checkpoints if which in (ref.name, ref.name.rsplit("/", 1)[-1])]
    if matching:
        return matching[0]
    if head.removed:
        raise UsageError(f"{url}: this run has been removed; it has no checkpoints")
    if not head.checkpoints:
        raise UsageError(f"{url}: the run has no checkpoint yet")
    steps = [str(step) for step in sorted({ref.step for ref in head.checkpoints})]
    shown = ", ".join(steps[-_SHOWN_STEPS:])
    raise UsageError(
        f"{url}: no retained checkpoint is called {which!r}; there are checkpoints of step "
        f"{'…, ' if len(steps) > _SHOWN_STEPS else ''}{shown}"
    )


def stored_sizes(store: Store) -> dict[str, int]:
    """Every object of the run's checkpoints that lies on its store, with its size."""
    return {entry.key: entry.size_bytes for prefix in ("checkpoints/", "data/") for entry in store.list(prefix)}


def _readable_root(store: Store, ref: CheckpointRef) -> Root | None:
    try:
        return read_root(store, ref)
    except (IntegrityError, NotFound):
        return None


def _reached(store: Store, refs: Iterable[CheckpointRef]) -> dict[str, set[str] | None]:
    """The store's own objects that each checkpoint needs; None where its root cannot be read."""
    reached: dict[str, set[str] | None] = {}
    for ref in refs:
        root = None if ref.home is not None else _readable_root(store, ref)
        reached[ref.name] = (set() if ref.home is not None else None) if root is None else checkpoint_keys(ref, root)
    return reached


def freed_bytes(store: Store, head: Head, dropped: Sequence[CheckpointRef]) -> int:
    """Stored bytes that only `dropped` reach among the checkpoints of `head`."""
    names = {ref.name for ref in dropped}
    reached = _reached(store, head.checkpoints)
    kept = {key for name, keys in reached.items() if name not in names for key in keys or ()}
    gone = {key for name in names for key in reached[name] or ()} - kept
    sizes = stored_sizes(store)
    return sum(sizes.get(key, 0) for key in gone)


def list_checkpoints(store: Store, *, clock: Clock) -> RunListing:
    """Everything that the newest head retains, and what it costs.

    Raises UsageError when there is no run, IntegrityError when no head verifies, and what the store raises.
    """
    state = read_run(store)
    head, now_s = state.head, clock.unix_s()
    reached = _reached(store, head.checkpoints)
    sizes = stored_sizes(store)
    users = Counter(key for keys in reached.values() for key in keys or ())
    lines = tuple(_line(ref, reached[ref.name], users, sizes, now_s) for ref in head.checkpoints)
    stored = sum(sizes.values())
    return RunListing(
        url=store.url, run_id=state.record.run_id, name=state.record.name, created_unix_s=state.record.created_unix_s,
        head=head.number, attempt=head.attempt, generation=head.generation, finished=head.finished, removed=head.removed,
        checkpoints=lines, forks=list_forks(store), stored_bytes=stored,
        unreached_bytes=stored - sum(sizes.get(key, 0) for key in users), altered=state.altered,
    )  # fmt: skip


def _line(
    ref: CheckpointRef, keys: set[str] | None, users: Counter[str], sizes: Mapping[str, int], now_s: float
) -> CheckpointLine:
    own_bytes = None if keys is None else sum(sizes.get(key, 0) for key in keys if users[key] == 1)
    return CheckpointLine(
        name=ref.name, step=ref.step, epoch=ref.epoch, generation=ref.generation, attempt=ref.attempt, unix_s=ref.unix_s,
        age_s=max(0.0, now_s - ref.unix_s), total_bytes=ref.total_bytes, own_bytes=own_bytes, home=ref.home,
    )  # fmt: skip


def list_forks(store: Store) -> tuple[ForkLine, ...]:
    """Who has put a pin here, needed or not. Pins that do not verify are left out."""
    forks = []
    for entry in store.list("pins/"):
        try:
            pin = unseal(store.get(entry.key, max_bytes=MAX_RECORD_BYTES), PinnedBy, what=entry.key)
        except (NotFound, IntegrityError):
            continue
        forks.append(ForkLine(pin.target, pin.checkpoint.step, pin.checkpoint.name, entry.key))
    return tuple(forks)


def show(store: Store, which: str | int = "latest", *, open_home: StoreOpener, clock: Clock) -> CheckpointDetails:
    """What one checkpoint holds. `which` as in `find_checkpoint`; no tensor data is read.

    Raises UsageError when there is no such checkpoint, IntegrityError or NotFound when its root or part does not verify.
    """
    head = read_run(store).head
    ref = find_checkpoint(head, which, url=store.url)
    reader = open_checkpoint(store, ref, open_home)
    objects = _objects(ref, reader)
    arrays = tuple(
        ArrayLine(array.name, array.dtype, array.shape, array.nbytes, array.library) for array in reader.arrays.values()
    )
    line = next(line for line in list_checkpoints(store, clock=clock).checkpoints if line.name == ref.name)
    previous, before_keys, before = _previous(store, head, ref, open_home)
    shared = sum(item.live_bytes for item in objects if (item.home, item.key) in before_keys)
    return CheckpointDetails(
        url=store.url, checkpoint=line, newest=current_checkpoints(head)[-1:] == [ref], metadata=reader.root.metadata,
        arrays=arrays, objects=objects, total_bytes=ref.total_bytes,
        new_bytes=sum(item.live_bytes for item in objects) - shared, shared_bytes=shared,
        borrowed_bytes=sum(item.live_bytes for item in objects if item.home is not None),
        previous=previous, changes=tuple(metadata_changes(before, reader.root.metadata)) if previous else (),
    )  # fmt: skip


def _objects(ref: CheckpointRef, reader: CheckpointReader) -> tuple[ObjectLine, ...]:
    """Every object that the checkpoint reads from, once, in the order of the parts."""
    sizes: dict[tuple[str | None, str], int] = {}
    live: Counter[tuple[str | None, str]] = Counter()
    ranges = set()
    for part in reader.parts:
        homes = [ref.home, *part.homes]
        places = [(homes[target.home], target.key) for target in part.objects]
        sizes |= {place: target.size_bytes for place, target in zip(places, part.objects, strict=True)}
        ranges |= {
            (places[chunk.object], chunk.offset, chunk.length) for entry in part.arrays for chunk in entry.chunks
        }
    for place, _, length in ranges:
        live[place] += length
    return tuple(ObjectLine(key, home, size, live[home, key]) for (home, key), size in sizes.items())


def _previous(
    store: Store, head: Head, ref: CheckpointRef, open_home: StoreOpener
) -> tuple[str | None, set[tuple[str | None, str]], Mapping[str, Any]]:
    """The retained checkpoint before `ref`: its name, the objects that it reads from, its metadata. Nothing when it cannot be
    read."""
    position = [other.name for other in head.checkpoints].index(ref.name)
    if position == 0:
        return None, set(), {}
    before = head.checkpoints[position - 1]
    try:
        reader = open_checkpoint(store, before, open_home)
    except HoldfastError:
        return None, set(), {}
    return before.name, {(item.home, item.key) for item in _objects(before, reader)}, reader.root.metadata


def metadata_changes(before: Any, now: Any, path: str = "") -> list[Change]:
    """Every value that differs between two JSON documents, in the order of the documents."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        changes: list[Change] = []
        for key in [*before, *(key for key in now if key not in before)]:
            changes += metadata_changes(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return changes
    return [] if before == now else [Change(path, before, now)]
