"""Two attempts at one run, their zombies, a reader, rollbacks and forks, in any order and under any luck (hypothesis finds both).

Each rule is one action of one actor from beginning to end; `Luck` decides what happens inside it: faults, a crash, or an action of
somebody else between two of its operations. After each rule the whole run is looked at through a clean client; in the end the
faults are healed, and one more attempt must leave no garbage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from history import History, Witness, make_state
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interleaved import RUN_ID, Dead, FakeClock, InlineExecutor, load_tree
from luck import CALM, Luck, Meanwhile, Strokes, lucks
from places import Place

from holdfast.checkpoint import heads
from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import CheckpointRef, RunRecord, head_key
from holdfast.checkpoint.heads import Lineage, head_numbers, read_truth
from holdfast.checkpoint.read import CheckpointReader, Fallback, restore_newest
from holdfast.checkpoint.record import RUN_KEY
from holdfast.checkpoint.retain import Keep, pinned_keys
from holdfast.checkpoint.runs.fork import fork
from holdfast.checkpoint.runs.rollback import rollback
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tree import flatten
from holdfast.core.errors import (
    Fenced,
    HoldfastError,
    IntegrityError,
    PermissionDenied,
    RestoreError,
    RunConflict,
    SaveError,
    StoreFull,
    StoreUnavailable,
    UsageError,
)
from holdfast.core.ids import TokenSource, seeded_tokens
from holdfast.core.sealed import FORMAT_VERSION, seal
from holdfast.store.base import Store
from holdfast.testing.faulty_store import FaultyStore

__all__ = ["RunMachine"]

_BORNE = (Dead, Fenced, SaveError, StoreUnavailable, PermissionDenied, StoreFull, IntegrityError, RestoreError)
"""What an action may raise under bad luck. NotFound is not among them: nothing that the truth needs is ever absent."""
_ZOMBIES = 3
_FORKS = 2


class SavePlan(NamedTuple):
    """What an attempt's next save is like. `again`: the state whose save failed last is saved once more."""

    values: tuple[int, ...]
    figure: int | None = None
    again: bool = False
    sweeps: bool = True


@dataclass(eq=False)
class Attempt:
    """One claim, alive or not. `unsaved` is the step whose save has failed last."""

    name: str
    store: FaultyStore
    lineage: Lineage
    committer: Committer
    unsaved: int | None = None


_NAMES = st.sampled_from("AB")
_WHO = st.sampled_from(["owner", "owner", "A", "B"])
_KEEPS = st.builds(
    Keep, last=st.integers(1, 3), best=st.sampled_from([None, "loss"]), mode=st.sampled_from(["min", "max"])
)
_SAVES = st.builds(
    SavePlan,
    values=st.tuples(*[st.integers(0, 3)] * 6),
    figure=st.one_of(st.none(), st.integers(0, 2)),
    again=st.booleans(),
    sweeps=st.booleans(),
)
_LUCK = st.runner().flatmap(lambda machine: lucks(network=machine.network))


class RunMachine(RuleBasedStateMachine):
    """`lineage_type` and `committer_type` are under test, so that a test can leave a rule of the protocol out."""

    network = False
    """Whether the place has a network that can be disturbed."""
    lineage_type: type[Lineage] = Lineage
    committer_type: type[Committer] = Committer

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.history = History(place)
        self.clock = FakeClock()
        self.slots: dict[str, Attempt] = {}
        self.zombies: list[Attempt] = []
        self.stores: list[FaultyStore] = []
        self.figures: dict[int, float | None] = {}
        self._seeds = count(1)
        self._steps = count(1)
        self.history.clean.put_new(
            RUN_KEY, seal(RunRecord(format=FORMAT_VERSION, run_id=RUN_ID, created_unix_s=0.0, name="run"))
        )

    # ---- rules

    @initialize(keep=_KEEPS, plans=st.lists(_SAVES, max_size=3))
    def a_run_that_has_begun(self, keep: Keep, plans: list[SavePlan]) -> None:
        if plans:
            self._claim("A", keep, CALM)
        for plan in plans:
            self._save(self.slots["A"], plan, CALM)

    @rule(name=_NAMES, keep=_KEEPS, luck=_LUCK)
    def claim(self, name: str, keep: Keep, luck: Luck) -> None:
        self._claim(name, keep, luck)

    @precondition(lambda self: self.slots)
    @rule(who=_WHO, plan=_SAVES, luck=_LUCK)
    def save(self, who: str, plan: SavePlan, luck: Luck) -> None:
        self._save(self._someone(who), plan, luck)

    @precondition(lambda self: self.slots)
    @rule(who=_WHO, plan=_SAVES, luck=_LUCK)
    def save_more(self, who: str, plan: SavePlan, luck: Luck) -> None:
        """Saves are what a run mostly does."""
        self._save(self._someone(who), plan, luck)

    @precondition(lambda self: self.slots)
    @rule(who=_WHO, luck=_LUCK)
    def sweep(self, who: str, luck: Luck) -> None:
        self._sweep(self._someone(who), luck)

    @precondition(lambda self: self.zombies)
    @rule(which=st.integers(0, _ZOMBIES - 1), plan=st.one_of(st.none(), _SAVES), luck=_LUCK)
    def zombie_goes_on(self, which: int, plan: SavePlan | None, luck: Luck) -> None:
        zombie = self.zombies[which % len(self.zombies)]
        if plan is None:
            self._sweep(zombie, luck)
        else:
            self._save(zombie, plan, luck)

    @precondition(lambda self: self.history.chain)
    @rule(luck=_LUCK)
    def read(self, luck: Luck) -> None:
        self._read(luck)

    @precondition(lambda self: any(store.pending for store in self.stores))
    @rule(which=st.integers(0, 7))
    def land(self, which: int) -> None:
        """One late write lands."""
        late = [(store, index) for store in self.stores for index in range(len(store.pending))]
        store, index = late[which % len(late)]
        store.land(index)

    @precondition(lambda self: len(self.history.retained) > 1)
    @rule(which=st.integers(0, 3), luck=_LUCK)
    def roll_back(self, which: int, luck: Luck) -> None:
        earlier = self.history.retained[:-1]
        self._rollback(earlier[which % len(earlier)], luck)

    @precondition(lambda self: self.history.retained and len(self.history.forks) < _FORKS)
    @rule(which=st.integers(0, 3), luck=_LUCK)
    def fork(self, which: int, luck: Luck) -> None:
        self._fork(self.history.retained[which % len(self.history.retained)], luck)

    @invariant()
    def all_stands(self) -> None:
        self.history.check(again=not self.network)

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self._end()
        finally:
            self.place.close()

    # ---- actions

    def _claim(self, name: str, keep: Keep, luck: Luck) -> None:
        if name in self.slots:
            self.zombies = [*self.zombies, self.slots.pop(name)][-_ZOMBIES:]
        store, tokens = self._store(), self._tokens()
        lineage = self.lineage_type(store, RUN_ID, clock=self.clock, tokens=tokens)
        self.history.keeps[lineage._owner] = keep

        def begin() -> None:
            head = lineage.claim()
            attempt = Attempt(name, store, lineage, self._committer(store, lineage, keep, tokens))
            found = self._restore(store, head, luck)
            if found is not None:
                attempt.committer.known.add(found.ref.name, *found.parts, home=found.ref.home)
                attempt.committer.roots.remember(found.root)
            self.slots[name] = attempt

        error = self._under(luck, store, name, begin)
        assert error is None or not luck.calm, f"a claim that nothing disturbs failed: {error!r}"
        if isinstance(error, Fenced):
            assert not self.history.owns(lineage), "the owner was told that it is not"

    def _save(self, attempt: Attempt, plan: SavePlan, luck: Luck) -> None:
        step = attempt.unsaved if plan.again else None
        if step is None:
            step = next(self._steps)
            self.history.states[step] = make_state(step, plan.values)
            self.figures[step] = None if plan.figure is None else float(plan.figure)
        attempt.unsaved = step
        flat = flatten(self.history.states[step])
        snapshot = stream(flat, lay_out(flat), step=step, epoch=0, metadata={"step": step})

        def go_on() -> None:
            committed = attempt.committer.commit(snapshot)
            attempt.unsaved = None
            self.history.assert_committed(committed.ref)
            if plan.sweeps:
                attempt.committer.sweep()

        self._as_attempt(attempt, luck, go_on)

    def _sweep(self, attempt: Attempt, luck: Luck) -> None:
        def go_on() -> None:
            attempt.committer.sweep()

        error = self._under(luck, attempt.store, attempt.name, go_on)
        assert error is None or not luck.calm, f"a sweep that nothing disturbs failed: {error!r}"
        self._bury(attempt, error)

    def _as_attempt(self, attempt: Attempt, luck: Luck, action: Callable[[], None]) -> None:
        owned = self.history.owns(attempt.lineage)
        error = self._under(luck, attempt.store, attempt.name, action)
        if luck.calm and owned:
            assert error is None, f"the owner's save, which nothing disturbed, failed: {error!r}"
        elif luck.calm:
            assert isinstance(error, Fenced), f"a stale attempt was not told so: {error!r}"
        if isinstance(error, Fenced):
            assert not self.history.owns(attempt.lineage), "the owner was told that it is not"
        self._bury(attempt, error)

    def _read(self, luck: Luck) -> None:
        store = self._store()

        def look() -> None:
            head = read_truth(store, RUN_ID).head
            if head is None:
                return
            assert head in self.history.chain, "a stale attempt's head was taken for the truth"
            found = self._restore(store, head, luck)
            if luck.calm:
                assert head == self.history.chain[-1]
                assert [found.ref] if found else self.history.retained[-1:] == []

        error = self._under(luck, store, "R", look)
        assert error is None or not luck.calm, f"a restore that nothing disturbs failed: {error!r}"

    def _rollback(self, target: CheckpointRef, luck: Luck) -> None:
        store = self._store()

        def go_back() -> None:
            rollback(store, target.name, open_home=self.place.open, clock=self.clock, tokens=self._tokens())
            assert luck.calm is False or self.history.retained[-1] == target

        error = self._under(luck, store, "R", go_back, also=(RunConflict, UsageError))
        assert error is None or not luck.calm, f"a rollback that nothing disturbs failed: {error!r}"

    def _fork(self, ref: CheckpointRef, luck: Luck) -> None:
        store, target = self._store(), self.place.fork_url(f"fork-{next(self._seeds)}")

        def open_home(url: str) -> Store:
            return store if url == store.url else self.place.open(url)

        def branch() -> None:
            fork(store.url, target, ref.name, open_home=open_home, clock=self.clock, tokens=self._tokens())
            self.history.forks[target] = ref.step

        error = self._under(luck, store, "R", branch, also=(RunConflict, UsageError))
        assert error is None or not luck.calm, f"a fork that nothing disturbs failed: {error!r}"

    def _restore(self, store: Store, head: Any, luck: Luck) -> CheckpointReader | None:
        """The newest checkpoint, verified and compared. Only bytes that arrive wrong may make it an older one."""

        def fell_back(fallback: Fallback) -> None:
            assert luck.corrupts, f"a sound checkpoint is called lost: {fallback}"

        def load(reader: CheckpointReader) -> CheckpointReader:
            self.history.assert_saved(reader.ref, load_tree(reader))
            return reader

        return restore_newest(store, head, self.place.open, load, fell_back=fell_back)

    def _meanwhile(self, what: Meanwhile, name: str) -> None:
        """Somebody else's whole action, between two operations of the actor `name`."""
        other = "A" if name == "B" else "B"
        plan = SavePlan((1, 2, 3, 0, 1, 2))
        match what:
            case Meanwhile.CLAIMED:
                self._claim(other, Keep(2), CALM)
            case Meanwhile.OVERTAKEN:
                self._claim(other, Keep(1), CALM)
                for values in ((0, 0, 0, 0, 0, 0), (3, 2, 1, 3, 2, 1)):
                    self._save(self.slots[other], plan._replace(values=values), CALM)
            case Meanwhile.SAVED if other in self.slots:
                self._save(self.slots[other], plan, CALM)
            case Meanwhile.READ if self.history.chain:
                self._read(CALM)
            case Meanwhile.LANDED:
                self._land_all()

    def _land_all(self) -> None:
        for store in self.stores:
            while store.pending:
                store.land()

    # ---- the actors' tools

    def _under(
        self,
        luck: Luck,
        store: FaultyStore,
        name: str,
        action: Callable[[], None],
        also: tuple[type[HoldfastError], ...] = (),
    ) -> BaseException | None:
        """Do it with this luck. What it raised, if that is something which an attempt must bear."""
        strokes = Strokes(luck, lambda what: self._meanwhile(what, name), writes=name != "R" or also != ())
        store.plan = strokes
        self.place.disturb(luck.wire)
        error: BaseException | None = None
        try:
            action()
        except BaseException as raised:
            if not isinstance(raised, (*_BORNE, *also)):
                raise
            error = raised
        finally:
            self.place.disturb(())
            if not strokes.dead:
                store.plan = lambda operation: None
        assert error is None or luck.explains(error), f"nothing that happened explains {error!r}"
        return error

    def _bury(self, attempt: Attempt, error: BaseException | None) -> None:
        if isinstance(error, Dead):
            self.slots = {name: other for name, other in self.slots.items() if other is not attempt}
            self.zombies = [zombie for zombie in self.zombies if zombie is not attempt]

    def _someone(self, who: str) -> Attempt:
        """The attempt of that name, or the one that owns the run; where there is none, any."""
        attempts = list(self.slots.values())
        if who == "owner":
            attempts.sort(key=lambda attempt: not self.history.owns(attempt.lineage))
        return self.slots.get(who, attempts[0])

    def _store(self) -> FaultyStore:
        store = FaultyStore(Witness(self.place.client(), self.history), clock=self.clock)
        self.stores.append(store)
        return store

    def _tokens(self) -> TokenSource:
        return seeded_tokens(next(self._seeds))

    def _committer(self, store: Store, lineage: Lineage, keep: Keep, tokens: TokenSource) -> Committer:
        return self.committer_type(
            store, lineage, keep=keep, open_home=self.place.open, clock=self.clock, tokens=tokens,
            hashing=InlineExecutor(), sending=InlineExecutor(), figure=self.figures.__getitem__,
        )  # fmt: skip

    # ---- the end

    def _end(self) -> None:
        """Everything heals, what was late lands, and one more attempt claims, saves and sweeps: nothing else may be left."""
        self._land_all()
        self.history.check()
        self._claim("A", Keep(2), CALM)
        self._save(self.slots["A"], SavePlan((0, 1, 2, 3, 0, 1)), CALM)
        self.history.check()
        clean = self.history.clean
        stored = {entry.key for entry in clean.list()}
        newest = [head_key(number) for number in head_numbers(clean)[-heads.HEADS_KEPT :]]
        pinned = pinned_keys(clean, self.place.open)
        assert pinned.stale == []
        pins = {key for key in stored if key.startswith("pins/")}
        garbage = stored - self.history.reached() - {RUN_KEY, *newest} - pinned.spared - pins
        assert not garbage, f"garbage that no sweep removes: {sorted(garbage)}"
