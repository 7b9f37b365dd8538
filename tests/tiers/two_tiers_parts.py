"""An attempt that saves by way of a machine's disk, opened as training opens it, and what its disk and its store may hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from interleaved import RUN_ID, FakeClock, load_tree, make_state, no_home, same_state
from parts import request

from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.near import near_disk
from holdfast.checkpoint.read import Fallback, restore_newest
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import Saver, SaverOptions
from holdfast.checkpoint.tier import LocalTier, Staged, Tier, load_staged
from holdfast.core.events import Event
from holdfast.core.ids import TokenSource, random_token
from holdfast.store.base import Body, Entry, Store
from holdfast.testing.faulty_store import Fault, Operation

__all__ = [
    "Attempt",
    "Gate",
    "Outage",
    "Told",
    "assert_disk_holds_newest",
    "begin",
    "by_hand",
    "disk_files",
    "folder_of",
    "newest_in_store",
    "number_of",
    "state",
]


def state(number: int) -> dict[str, Any]:
    return make_state("A", number)


def number_of(found: Any) -> int:
    """Which state it is, exactly; -1 for none."""
    if found is None:
        return -1
    number = int(found["who"][1:])
    assert same_state(found, state(number)), "not the arrays that were saved"
    return number


@dataclass
class Told:
    """What the saver reports, as it comes. Thread-safe."""

    also: Callable[[Event], None] = lambda event: None
    events: list[Event] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def emit(self, event: Event) -> None:
        self.also(event)
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    def steps(self, name: str) -> list[int]:
        with self._news:
            return [event.fields["step"] for event in self.events if event.name == name]

    def wait_for(self, name: str, step: int) -> None:
        with self._news:
            assert self._news.wait_for(
                lambda: any(event.name == name and event.fields["step"] == step for event in self.events), 60
            ), f"{name} of step {step} does not come: {self.events}"


@dataclass
class Attempt:
    """One claim with its saver. `restored` is the number of the state that it began with, -1 for none."""

    store: Store
    lineage: Lineage
    tier: Tier | None
    saver: Saver
    told: Told
    restored: int = -1
    staged: Staged | None = None
    fallbacks: list[Fallback] = field(default_factory=list)

    def stage(self, number: int, *, finish: bool = False) -> Any:
        """Save, and wait until it is on the disk."""
        handle = self.saver.save(request(state(number), number, finish=finish))
        self.told.wait_for("save.staged", number)
        return handle

    def save(self, number: int, *, finish: bool = False) -> None:
        """Save, and wait until it is committed and swept."""
        self.saver.save(request(state(number), number, finish=finish)).wait(60)
        assert self.saver.drain(60)

    def warnings(self) -> list[str]:
        said: list[str] = []
        self.saver.check(said.append)
        return said

    def close(self) -> None:
        self.saver.close(60)


def begin(
    store: Store,
    local: LocalTier | None,
    *,
    wrap: Callable[[Store], Store] = lambda disk: disk,
    keep: int | None = 1,
    also: Callable[[Event], None] = lambda event: None,
    tokens: TokenSource = random_token,
    max_unsaved: int = 3,
) -> Attempt:
    """Claim, take the disk, restore, adopt: as `train/session.py` does. `wrap` stands between the tier and its disk."""
    clock, told = FakeClock(), Told(also)
    lineage = Lineage(store, RUN_ID, clock=clock, tokens=tokens)
    head = lineage.claim()
    tier = None
    if local is not None:
        tier = Tier(local, RUN_ID)
        tier.store = wrap(tier.store)
        if not tier.hold():
            tier = None
    options = SaverOptions(keep=Keep(keep), hash_threads=1, send_threads=1, max_unsaved=max_unsaved)
    saver = Saver(
        store, lineage, options=options, open_home=no_home, clock=clock, tokens=tokens, sink=told, tier=tier,
    )  # fmt: skip
    attempt = Attempt(store, lineage, tier, saver, told)
    fell_back = attempt.fallbacks.append
    if tier is not None:
        found = load_staged(tier, store, head, no_home, load_tree, fell_back=fell_back)
        if found is not None:
            attempt.staged, tree = found
            attempt.restored = number_of(tree)
            saver.adopt(attempt.staged)
            return attempt
    near = [] if tier is None else [near_disk(tier.store)]
    read = restore_newest(
        store, head, no_home, lambda reader: (reader, load_tree(reader)), fell_back=fell_back, near=near
    )
    if read is not None:
        reader, tree = read
        attempt.restored = number_of(tree)
        saver.known.add(reader.ref.name, *reader.parts, home=None)
        saver.roots.remember(reader.root)
    return attempt


def newest_in_store(store: Store) -> int:
    """The number of the state that an attempt without the disk would begin with."""

    def never(fallback: Fallback) -> None:
        raise AssertionError(f"a checkpoint that a head names is not whole: {fallback}")

    head = read_truth(store, RUN_ID).head
    return -1 if head is None else number_of(restore_newest(store, head, no_home, load_tree, fell_back=never))


def folder_of(local: LocalTier) -> Path:
    return Path(local.folder) / RUN_ID


def disk_files(local: LocalTier) -> set[str]:
    """Every object on the disk, by its key."""
    objects = folder_of(local) / "objects"
    return {str(path.relative_to(objects)) for path in objects.rglob("*") if path.is_file()}


def assert_disk_holds_newest(attempt: Attempt, local: LocalTier) -> None:
    """After `close`, when all was committed: the newest checkpoint's own objects, its record, and nothing else."""
    head = attempt.lineage.head
    root = attempt.saver.roots.get(head.checkpoints[-1])
    name = root.name
    allowed = {f"staged/{name.removeprefix('checkpoints/')}.json", f"{name}/root.json", f"{name}/part-0", *root.objects}
    assert disk_files(local) <= allowed
    assert f"staged/{name.removeprefix('checkpoints/')}.json" in disk_files(local)


class Gate:
    """A store whose puts wait while the gate is closed: a network that stands still."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.open = threading.Event()
        self.open.set()

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def is_near(self) -> bool:
        return self.inner.is_near

    def put(self, key: str, body: Body) -> None:
        assert self.open.wait(60)
        self.inner.put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        assert self.open.wait(60)
        return self.inner.put_new(key, body)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.inner.get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.inner.read_into(key, offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def close(self) -> None:
        self.inner.close()


class Outage:
    """A plan: while `on`, nothing is answered."""

    on = False

    def __call__(self, operation: Operation) -> Fault | None:
        return Fault.UNAVAILABLE_BEFORE if self.on else None


def by_hand(store: Store, kind: str, change: Any) -> None:
    lineage = Lineage(store, RUN_ID, clock=FakeClock(), tokens=random_token)
    lineage.claim(lambda body: msgspec.structs.replace(change(body), kind=kind))
