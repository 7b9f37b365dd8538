"""Several attempts at one run, interleaved at single store operations, with every invariant of the protocol checked after each.

    actor's thread → ActorStore (waits for its turn, suffers a fault) → World (applies, checks) → memory

Only one thread runs at a time: an actor goes on when the test gives it a number of operations, and stops before the one after them.
So a schedule is plain data and a failure can be replayed. What runs in the actors is the real code: claims, commits with
deduplication and retention, sweeps, restores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from threading import Semaphore, Thread
from typing import Any, TypeVar

import numpy as np

from holdfast.checkpoint.arrays import adapter_named
from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import CheckpointRef, Head, Part, Root, decode_part, head_key
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import CheckpointReader, Target, restore_newest
from holdfast.checkpoint.retain import Keep, StoreOpener, checkpoint_keys, pinned_keys
from holdfast.checkpoint.runs.base import adopt_base, relies_on
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tree import decode_document, flatten, unflatten
from holdfast.core.errors import Fenced, RunConflict, SaveError, StoreUnavailable, UsageError
from holdfast.core.ids import TokenSource, seeded_tokens
from holdfast.core.sealed import unseal
from holdfast.store.base import Body, Entry, Store, flat_buffers
from holdfast.store.memory import MemoryStore

RUN_ID = "run"
KEPT = 2
SCALE = 10 if os.environ.get("HOLDFAST_TEST_SCALE") == "long" else 1
_ALL = 1 << 30
_Result = TypeVar("_Result")


class Dead(BaseException):
    """The process ends here, as SIGKILL ends it."""


class Suffers(Enum):
    """What happens to one operation of an actor."""

    LOST = "applied, and the answer is lost"
    REFUSED = "not applied, and never will be"
    LATE = "no answer, and applied when the test says so"
    TAKEN = "put_new is applied and says that the name is taken"
    CRASH_BEFORE = "the process dies before it"
    CRASH_AFTER = "the process dies after it"


class FakeClock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class InlineExecutor(Executor):
    """Runs a task where it is submitted, so that an actor's operations have one order."""

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> Future[_Result]:
        future: Future[_Result] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def no_home(url: str) -> Store:
    raise AssertionError(f"no other run is needed here, but {url} was opened")


class InlinePool(ThreadPoolExecutor):
    """Where a thread pool is asked for by type: runs tasks where they are submitted."""

    submit = InlineExecutor.submit


def load_tree(reader: CheckpointReader) -> Any:
    """The whole tree of a checkpoint in fresh memory, verified, read in the calling thread."""
    arrays = reader.arrays
    made = {name: adapter_named(stored.library).allocate(stored.spec()) for name, stored in arrays.items()}
    pairs = [(arrays[name], adapter_named(arrays[name].library).writable(made[name])) for name in made]
    with InlinePool(1) as pool:
        reader.read([Target(stored, memory) for stored, memory in pairs if memory is not None], pool)
    return unflatten(decode_document(reader.document()), made.__getitem__)


def make_state(author: str, number: int) -> dict[str, Any]:
    """Three arrays: one always new, one always the same, one that comes back after retention has dropped it."""
    own = f"{author}{number}".ljust(16)[:16].encode()
    return {
        "new": np.frombuffer(own, dtype=np.uint8),
        "same": np.arange(64, dtype=np.uint8),
        "back": np.full(64, (number // 2) % 2, dtype=np.uint8),
        "who": f"{author}{number}",
    }


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


class World:
    """The store's contents and everything that must hold for them. `chain` is the lineage: every head that ever was the truth.

    A trial's world stands beside that of its `base`, in which the actors are.
    """

    def __init__(self, url: str = "memory://world", base: World | None = None) -> None:
        self.url, self.base = url, base
        self.trials: list[World] = []
        if base is not None:
            base.trials.append(self)
        self.memory = MemoryStore()
        self.clock = FakeClock()
        self.chain: list[Head] = []
        self.roots: dict[str, Root] = {}
        self.parts: dict[str, Part] = {}
        self.states: dict[str, dict[str, Any]] = {}
        self.condemned: set[str] = set()
        self.late: list[Callable[[], None]] = []
        self.actors: list[Actor] = []

    # Writes, and what they must not do

    def put(self, key: str, body: bytes, state: dict[str, Any] | None) -> None:
        assert key not in self.keys(), f"{key} is overwritten"
        self.memory.put(key, body)
        if key.endswith("/part-0"):
            self.parts[key.removesuffix("/part-0")] = decode_part(body, what=key)
        if key.endswith("/root.json"):
            root = unseal(body, Root, what=key)
            self.roots[root.name] = root
            if state is not None:
                self.states[root.name] = state

    def put_new(self, key: str, body: bytes) -> bool:
        created = self.memory.put_new(key, body)
        if created and key.startswith("heads/"):
            self._new_head(unseal(body, Head, what=key))
        return created

    def delete(self, key: str) -> None:
        if key.startswith("heads/"):
            assert key != head_key(self.chain[-1].number), "the truth is deleted"
        elif key.startswith("pins/"):
            assert key not in self.pins_named(), f"{key} is deleted, and its trial still names it"
        else:
            assert key in self.condemned, f"{key} is deleted, and no head of the lineage condemns it"
        self.memory.delete(key)
        self._no_holes()

    def _new_head(self, head: Head) -> None:
        truth = self.chain[-1] if self.chain else None
        if truth is not None and head.number <= truth.number:
            return  # A stale attempt's, at a number that was pruned: it must come to learn that it does not count.
        if truth is None:
            assert (head.number, head.parent, head.checkpoints) == (1, "", [])
        else:
            assert head.number == truth.number + 1, "a number was left out"
            assert head.parent == truth.nonce, "the new truth does not derive from the old one"
            if head.kind == "claim":
                assert head.checkpoints == truth.checkpoints, "a claim lost checkpoints"
                assert head.attempt == truth.attempt + 1
            elif head.kind in ("base", "withdraw"):
                assert (head.owner, head.checkpoints) == (truth.owner, truth.checkpoints)
            else:
                assert head.owner == truth.owner, "a fenced attempt's head became the truth"
                assert head.checkpoints[:-1] == truth.checkpoints[-(KEPT - 1) :], "retention lost a checkpoint"
        self.chain.append(head)
        self.condemned |= set(head.condemned)
        assert not self.reached() & self.condemned, "a condemned object is referred to"
        self._no_holes()

    def _no_holes(self) -> None:
        missing = self.reached() - self.keys()
        assert not missing, f"the truth names objects that are gone: {sorted(missing)}"
        for trial in self.trials:
            trial._no_holes()
        if self.base is not None and self.chain:
            borrowed = {
                target.key
                for ref in self.chain[-1].checkpoints
                for target in self.parts[ref.name].objects
                if target.home
            }
            pins = {f"pins/{pin.name}.json" for pin in self.chain[-1].pins} if borrowed else set()
            assert pins or not borrowed, "a trial borrows and names no pin"
            missing = (borrowed | pins) - self.base.keys()
            assert not missing, f"the truth of a trial names objects of its base that are gone: {sorted(missing)}"

    def reached(self) -> set[str]:
        """Every object that the truth's checkpoints need."""
        if not self.chain:
            return set()
        return {key for ref in self.chain[-1].checkpoints for key in checkpoint_keys(ref, self.roots[ref.name])}

    def pins_named(self) -> set[str]:
        """The pins here that the truths of trials name."""
        return {f"pins/{pin.name}.json" for trial in self.trials for head in trial.chain[-1:] for pin in head.pins}

    def keys(self) -> set[str]:
        return set(self.memory._contents.objects)

    def assert_committed(self, ref: CheckpointRef) -> None:
        assert any(ref in head.checkpoints for head in self.chain), f"{ref.name} was reported as committed, and is not"

    # Schedules

    def actor(self, name: str, program: Callable[[Actor], None]) -> Actor:
        actor = Actor(name, self, program)
        self.actors.append(actor)
        return actor

    def land(self, index: int = 0) -> None:
        if self.late:
            self.late.pop(index % len(self.late))()

    def finish(self) -> None:
        """Let everybody run to the end; then nobody may have left anything that a fresh attempt does not clear away."""
        for actor in self.actors:
            actor.run(_ALL)
        self.actors = []
        for name, world in [*zip("XY", self.trials, strict=False), ("Z", self)]:
            last = self.actor(name, lambda actor, world=world: attempt(actor, saves=1, world=world))  # type: ignore[misc]
            last.run(_ALL)
            assert last.outcome == "done"
        for world in (*self.trials, self):
            world._no_garbage()

    def _no_garbage(self) -> None:
        spared: set[str] = set()
        if self.trials:
            by_url = {trial.url: trial.memory for trial in self.trials}
            spared = pinned_keys(self.memory, by_url.__getitem__).spared
            assert {key for key in self.keys() if key.startswith("pins/")} == self.pins_named()
        garbage = {key for key in self.keys() if key.startswith(("data/", "checkpoints/"))} - self.reached() - spared
        assert not garbage, f"garbage that no sweep removes: {sorted(garbage)}"

    def stop(self) -> None:
        """End the threads that are still there."""
        for actor in self.actors:
            actor.kill()


@dataclass(eq=False)
class Actor:
    """One process. `outcome`: "" while it runs, then "done", "fenced", "dead", or "gave up" (the store did not answer)."""

    name: str
    world: World
    program: Callable[[Actor], None]
    outcome: str = ""
    operations: int = 0
    suffers: Suffers | None = None
    _budget: int = 0
    _dead: bool = False
    _error: BaseException | None = None
    _go: Semaphore = field(default_factory=lambda: Semaphore(0))
    _stopped: Semaphore = field(default_factory=lambda: Semaphore(0))
    _thread: Thread | None = None

    @property
    def tokens(self) -> TokenSource:
        return seeded_tokens(ord(self.name))

    def run(self, operations: int) -> None:
        """Go on for so many store operations, or to the end. Raises what the actor's invariants raise."""
        if self.outcome or operations == 0:
            return
        self._budget = operations
        if self._thread is None:
            self._thread = Thread(target=self._main, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def kill(self) -> None:
        self._dead = True
        if self._thread is not None and not self.outcome:
            self._go.release()
            self._thread.join()

    def turn(self, method: str) -> Suffers | None:
        """Called before every operation, in the actor's thread."""
        if self._dead:
            raise Dead
        if self._budget == 0:
            self._stopped.release()
            self._go.acquire()
        if self._dead:
            raise Dead
        self._budget -= 1
        self.operations += 1
        suffers = self.suffers
        if suffers is None or (suffers is Suffers.TAKEN and method != "put_new"):
            return None
        if suffers is Suffers.LATE and method not in ("put", "put_new", "delete"):
            return None
        self.suffers = None
        return suffers

    def die(self) -> None:
        self._dead = True
        raise Dead

    def _main(self) -> None:
        outcome = "done"
        try:
            self.program(self)
        except Fenced:
            outcome = "fenced"
        except Dead:
            outcome = "dead"
        except StoreUnavailable:
            outcome = "gave up"
        except BaseException as error:
            outcome, self._error = "failed", error
        self.outcome = outcome
        self._stopped.release()


class ActorStore:
    """The store as one actor sees it: of the world that it is in, or of another."""

    def __init__(self, actor: Actor, world: World | None = None) -> None:
        self._actor = actor
        self._world = world or actor.world
        self.url = self._world.url
        self.is_near = True
        self.state: dict[str, Any] | None = None

    def put(self, key: str, body: Body) -> None:
        copied, state = b"".join(flat_buffers(body)), self.state
        self._do("put", lambda: self._world.put(key, copied, state))

    def put_new(self, key: str, body: bytes) -> bool:
        return self._do("put_new", lambda: self._world.put_new(key, body))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._do("get", lambda: self._world.memory.get(key, max_bytes=max_bytes))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._do("read_into", lambda: self._world.memory.read_into(key, offset, buffer))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._do("list", lambda: self._world.memory.list(prefix))

    def delete(self, key: str) -> None:
        self._do("delete", lambda: self._world.delete(key))

    def close(self) -> None:
        return None

    def _do(self, method: str, apply: Callable[[], _Result]) -> _Result:
        suffers = self._actor.turn(method)
        if suffers is Suffers.CRASH_BEFORE:
            self._actor.die()
        if suffers is Suffers.LATE:
            self._actor.world.late.append(lambda: _ignore(apply()))
        if suffers in (Suffers.LATE, Suffers.REFUSED):
            raise StoreUnavailable("no answer")
        result = apply()
        if suffers is Suffers.LOST:
            raise StoreUnavailable("the answer was lost")
        if suffers is Suffers.CRASH_AFTER:
            self._actor.die()
        return False if suffers is Suffers.TAKEN else result  # type: ignore[return-value]


def _ignore(result: object) -> None:
    return None


# Programs


def attempt(actor: Actor, *, saves: int, world: World | None = None) -> None:
    """What a training process does: claim, restore, save, sweep. Saves that fail are warnings; the next one goes on."""
    world, tokens = world or actor.world, actor.tokens
    store = ActorStore(actor, world)
    lineage = Lineage(store, RUN_ID, clock=world.clock, tokens=tokens)
    try:
        _train(actor, world, store, lineage, saves, tokens)
    except Fenced:
        assert world.chain[-1].owner != lineage._owner, "the owner was told that it is not"
        raise


def _train(actor: Actor, world: World, store: ActorStore, lineage: Lineage, saves: int, tokens: TokenSource) -> None:
    homes = {other.url: ActorStore(actor, other) for other in (*world.trials, *([world.base] if world.base else []))}
    open_home = homes.__getitem__ if homes else no_home
    head = lineage.claim()
    committer = Committer(
        store, lineage, keep=Keep(KEPT), open_home=open_home, clock=world.clock, tokens=tokens,
        hashing=InlineExecutor(), sending=InlineExecutor(),
    )  # fmt: skip
    if world.base is not None:
        _take_base(world, store, lineage, committer, homes[world.base.url], open_home, tokens)
    found = restore_newest(store, head, open_home, lambda reader: (reader, load_tree(reader)), fell_back=_never)
    if found is not None:
        reader, state = found
        assert same_state(state, world.states[reader.ref.name]), "restore gave another state than was saved"
        committer.known.add(reader.ref.name, *reader.parts, home=None)
        committer.roots.remember(reader.root)
    for number in range(saves):
        store.state = make_state(actor.name, number)
        flat = flatten(store.state)
        try:
            committed = committer.commit(stream(flat, lay_out(flat), step=number, epoch=0, metadata={}))
        except (SaveError, StoreUnavailable):
            continue
        world.assert_committed(committed.ref)
        try:
            committer.sweep()
        except StoreUnavailable:
            continue


def _take_base(
    world: World, store: ActorStore, lineage: Lineage, committer: Committer, base: ActorStore, open_home: StoreOpener,
    tokens: TokenSource,
) -> None:  # fmt: skip
    if relies_on(lineage.head, committer.roots, base.url):
        return
    try:
        adopted = adopt_base(
            store, base, "latest", lineage, roots=committer.roots, open_home=open_home, tokens=tokens, warn=_never
        )
    except (UsageError, RunConflict, StoreUnavailable):
        return  # There is nothing yet, or no answer: everything is sent.
    committer.known.add_base(adopted.parts, adopted.home, adopted.keys)


def reader(actor: Actor, *, times: int) -> None:
    """Somebody who looks at the run from outside."""
    world, store = actor.world, ActorStore(actor)
    for _ in range(times):
        head = read_truth(store, RUN_ID).head
        if head is None:
            continue
        assert head in world.chain, "a stale attempt's head was taken for the truth"
        found = restore_newest(store, head, no_home, lambda r: (r, load_tree(r)), fell_back=_never)
        if found is not None:
            assert same_state(found[1], world.states[found[0].ref.name])


def _never(fallback: object) -> None:
    raise AssertionError(f"a sound checkpoint is called lost: {fallback}")


def play(world: World, actors: Sequence[Actor], events: Sequence[tuple[int, str]]) -> None:
    """Run the current actor for some operations, then switch to another, hurt the next operation, or let a late write land."""
    current = actors[0]
    by_name = {actor.name: actor for actor in actors}
    try:
        for operations, action in events:
            current.run(operations)
            if action in by_name:
                current = by_name[action]
            elif action == "land":
                world.land()
            else:
                current.suffers = Suffers[action]
        world.actors.sort(key=lambda actor: actor is not current)
        world.finish()
    finally:
        world.stop()
