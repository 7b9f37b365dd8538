"""Real runs for tests: numpy trees saved by the real Saver, read back by the real reader; and a store that lets somebody in
between.

`Trainer` does what a training process does with a run: open, claim, restore the newest checkpoint, save, sweep. `Interruptions`
wraps stores so that one chosen operation, counted over all of them, is a crash or the moment of another process.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import CheckpointReader, Target, open_checkpoint, restore_newest
from holdfast.checkpoint.retain import Keep, Roots, StoreOpener, checkpoint_keys, pinned_keys
from holdfast.checkpoint.runs.base import adopt_base, relies_on
from holdfast.checkpoint.runs.fork import Forked, Mode, fork
from holdfast.checkpoint.runs.remove import remove
from holdfast.checkpoint.saver import Saver, SaveRequest, SaverOptions
from holdfast.checkpoint.tree import decode_document, flatten, unflatten
from holdfast.core.events import CollectingSink
from holdfast.core.ids import TokenSource, seeded_tokens
from holdfast.store.base import Body, Entry, Store
from holdfast.store.memory import MemoryStore
from holdfast.train.opening import open_run

__all__ = [
    "Crash",
    "FakeClock",
    "Interruptions",
    "Trainer",
    "Tree",
    "World",
    "assert_clean",
    "checkpoints_of",
    "head_of",
    "newest_tree",
    "read_tree",
    "tree_at",
    "trees_equal",
]

_T = TypeVar("_T")
Tree = dict[str, np.ndarray[Any, Any]]


class FakeClock:
    """Time passes only when somebody sleeps."""

    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def tree_at(step: int, *, lineage: int = 0, frozen: int = 0) -> Tree:
    """A state: a large array that never changes (deduplicated), and small ones that change with every step."""
    return {
        "frozen": np.random.default_rng(frozen).integers(0, 256, 20_000, dtype=np.uint8),
        "moving": np.random.default_rng([step, lineage]).standard_normal(300),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "step": np.array(step, dtype=np.int64),
    }


def trees_equal(one: Tree, other: Tree) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def _load(reader: CheckpointReader) -> Tree:
    arrays = {name: np.empty(stored.shape, _DTYPES[stored.dtype]) for name, stored in reader.arrays.items()}
    with ThreadPoolExecutor(2) as pool:
        wanted = [
            Target(reader.arrays[name], array.reshape(-1).view(np.uint8).data)
            for name, array in arrays.items()
            if array.size
        ]
        reader.read(wanted, pool)
    tree = unflatten(decode_document(reader.document()), arrays.__getitem__)
    return dict(tree)


_DTYPES = {"u8": np.uint8, "f64": np.float64, "f32": np.float32, "i64": np.int64}


def read_tree(store: Store, ref: CheckpointRef, open_home: StoreOpener) -> Tree:
    """The state in one checkpoint, every byte of it verified."""
    return _load(open_checkpoint(store, ref, open_home))


def head_of(store: Store) -> Head:
    head = read_truth(store).head
    assert head is not None
    return head


def checkpoints_of(store: Store) -> list[CheckpointRef]:
    """What the truth retains; nothing where there is no run."""
    head = read_truth(store).head
    return head.checkpoints if head else []


def newest_tree(store: Store, open_home: StoreOpener) -> Tree:
    return read_tree(store, head_of(store).checkpoints[-1], open_home)


class Trainer:
    """One attempt at a run. `restored` is the state that it began with, None for the first."""

    def __init__(
        self,
        store: Store,
        open_home: StoreOpener,
        *,
        keep: int | None = 3,
        seed: int = 0,
        extend: bool = True,
        fresh: bool = False,
        base: str | None = None,
        base_step: str | int = "latest",
    ) -> None:
        self.store, self.clock, self.sink = store, FakeClock(), CollectingSink()
        tokens = seeded_tokens(seed)
        claim = open_run(
            store, is_default_url=False, identity="identity", fresh=fresh, extend=extend, clock=self.clock, tokens=tokens,
            warn=lambda text: None,
        )  # fmt: skip
        assert claim.head is not None
        assert claim.lineage is not None
        self.saver = Saver(
            store, claim.lineage, options=SaverOptions(keep=Keep(keep), staging_cap_bytes=1 << 20), open_home=open_home,
            clock=self.clock, tokens=tokens, sink=self.sink,
        )  # fmt: skip

        self.warnings: list[str] = []
        try:
            self.restored = self._begin(claim.head, claim.lineage, open_home, tokens, base, base_step)
        except BaseException:
            self.close()
            raise

    def _begin(
        self,
        head: Head,
        lineage: Lineage,
        open_home: StoreOpener,
        tokens: TokenSource,
        base: str | None,
        base_step: str | int,
    ) -> Tree | None:
        if base is not None and not relies_on(head, self.saver.roots, base):
            adopted = adopt_base(
                self.store, open_home(base), base_step, lineage, roots=self.saver.roots, open_home=open_home, tokens=tokens,
                warn=self.warnings.append,
            )  # fmt: skip
            self.saver.known.add_base(adopted.parts, adopted.home, adopted.keys)

        def load(reader: CheckpointReader) -> Tree:
            tree = _load(reader)
            self.saver.known.add(reader.ref.name, *reader.parts, home=reader.ref.home)
            self.saver.roots.remember(reader.root)
            return tree

        return restore_newest(self.store, lineage.head, open_home, load, fell_back=lambda fallback: None)

    def save(self, step: int, tree: Tree | None = None, *, finish: bool = False, **metadata: Any) -> CheckpointRef:
        """Save, commit and sweep. Raises what the save raised."""
        request = SaveRequest(
            flat=flatten(tree if tree is not None else tree_at(step)), step=step, epoch=step // 10,
            metadata={"step": step, **metadata}, reason="test", deferrable=lambda leaf: False, finish=finish,
        )  # fmt: skip
        handle = self.saver.save(request)
        self.saver.drain()
        return handle.wait(0)

    def close(self) -> None:
        self.saver.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def assert_clean(store: Store, open_home: StoreOpener) -> None:
    """Every stored object is reached by a retained checkpoint here or wanted by a fork, and nothing that is wanted is missing."""
    head, roots = head_of(store), Roots(store, open_home)
    pinned = pinned_keys(store, open_home)
    assert pinned.stale == []
    reached = {key for ref in head.checkpoints for key in checkpoint_keys(ref, roots.get(ref))} | pinned.spared
    stored = {entry.key for prefix in ("data/", "checkpoints/") for entry in store.list(prefix)}
    assert stored == reached


class World:
    """Runs side by side, all in memory. `through` puts a layer over every store that a fork or a trainer uses."""

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}
        self._seeds = itertools.count(1)
        self.clock = FakeClock()

    def open(self, url: str) -> Store:
        return self._stores.setdefault(url, _Named(url))

    def trainer(
        self, url: str, keep: int | None = 3, through: Callable[[Store], Store] = lambda store: store, **options: Any
    ) -> Trainer:
        open_home = self._layered(through)
        return Trainer(open_home(url), open_home, keep=keep, seed=next(self._seeds), **options)

    def _layered(self, through: Callable[[Store], Store]) -> StoreOpener:
        return functools.cache(lambda url: through(self.open(url)))

    def fork(
        self, source: str, target: str, step: str | int = "latest", mode: Mode = "reference",
        through: Callable[[Store], Store] = lambda store: store,
    ) -> Forked:  # fmt: skip
        open_home = self._layered(through)
        return fork(
            source,
            target,
            step,
            mode,
            open_home=open_home,
            clock=self.clock,
            tokens=seeded_tokens(1000 + next(self._seeds)),
        )

    def clean(self, *urls: str) -> None:
        for url in urls:
            assert_clean(self.open(url), self.open)

    def remove(self, url: str, *, force: bool = False) -> None:
        remove(
            self.open(url), open_home=self.open, clock=self.clock, tokens=seeded_tokens(2000 + next(self._seeds)), force=force
        )  # fmt: skip

    def pins(self, url: str) -> list[str]:
        return [entry.key for entry in self.open(url).list("pins/")]


class _Named(MemoryStore):
    """Private objects under a name of their own."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url


class Crash(BaseException):
    """The process is gone: this and every later operation."""


class Interruptions:
    """At operation number `at` (over all wrapped stores) `action` runs, before or after it. `counted` tells how many there were.

    With `crash`, the operation and everything after it raises `Crash`.
    """

    def __init__(
        self, at: int | None = None, action: Callable[[], None] = lambda: None, *, after: bool, crash: bool = False
    ) -> None:
        self.counted = 0
        self._at, self._action, self._after, self._crash = at, action, after, crash
        self._dead = False
        self._lock = Lock()

    def wrap(self, store: Store) -> Store:
        return _Interrupted(store, self)

    def around(self, apply: Callable[[], _T]) -> _T:
        with self._lock:
            if self._dead:
                raise Crash
            here, self.counted = self.counted == self._at, self.counted + 1
            self._dead = here and self._crash and not self._after
        if here and not self._after:
            self._strike()
        try:
            return apply()
        finally:
            if here and self._after:
                self._dead = self._crash
                self._strike()

    def _strike(self) -> None:
        if self._crash:
            raise Crash
        self._action()


class _Interrupted:
    def __init__(self, inner: Store, interruptions: Interruptions) -> None:
        self._inner, self._around = inner, interruptions.around

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def is_near(self) -> bool:
        return self._inner.is_near

    def put(self, key: str, body: Body) -> None:
        self._around(lambda: self._inner.put(key, body))

    def put_new(self, key: str, body: bytes) -> bool:
        return self._around(lambda: self._inner.put_new(key, body))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._around(lambda: self._inner.get(key, max_bytes=max_bytes))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._around(lambda: self._inner.read_into(key, offset, buffer))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._around(lambda: self._inner.list(prefix))

    def delete(self, key: str) -> None:
        self._around(lambda: self._inner.delete(key))

    def close(self) -> None:
        self._inner.close()
