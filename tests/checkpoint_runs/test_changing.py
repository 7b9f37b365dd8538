"""Rolling back, dropping and removing: beside a running trainer, cut short at every moment, and beside forks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from run_builder import (
    Crash,
    FakeClock,
    Interruptions,
    Trainer,
    assert_clean,
    head_of,
    newest_tree,
    read_tree,
    tree_at,
    trees_equal,
)

from holdfast.checkpoint.heads import head_numbers
from holdfast.checkpoint.runs.fork import fork
from holdfast.checkpoint.runs.remove import plan_removal, remove
from holdfast.checkpoint.runs.rollback import drop, plan_drop, plan_rollback, rollback
from holdfast.core.errors import Fenced, HoldfastError, IntegrityError, RunConflict, RunRemoved, SaveError, UsageError
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.train.opening import open_run


class _Stores:
    def __init__(self) -> None:
        self._known: dict[str, Store] = {}

    def open(self, url: str) -> Store:
        return self._known.setdefault(url, _Named(url))


class _Named(MemoryStore):
    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url


RUN, FORK = "memory://run", "memory://fork"


def a_run(steps: tuple[int, ...] = (1, 2, 3, 4), *, finish: bool = False) -> tuple[Store, _Stores]:
    stores = _Stores()
    store = stores.open(RUN)
    with Trainer(store, stores.open, keep=None) as trainer:
        for step in steps:
            trainer.save(step, finish=finish and step == steps[-1])
    return store, stores


def _again(store: Store, stores: _Stores) -> None:
    with Trainer(store, stores.open, keep=None, seed=91) as trainer:
        trainer.save(50)


def _rollback(store: Store, stores: _Stores, step: int = 2) -> None:
    rollback(store, step, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(11))


def _drop(store: Store, stores: _Stores, step: int = 2) -> None:
    drop(store, step, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(12))


def _remove(store: Store, stores: _Stores, *, force: bool = False) -> None:
    remove(store, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(13), force=force)


def _steps(store: Store) -> list[int]:
    return [ref.step for ref in head_of(store).checkpoints]


@pytest.mark.parametrize("finish", [False, True])
def test_a_rolled_back_run_goes_on_from_there(finish: bool) -> None:
    store, stores = a_run(finish=finish)
    before = sum(entry.size_bytes for entry in store.list("data/"))
    plan = plan_rollback(store, 2)
    assert (plan.head, [ref.step for ref in plan.dropped], plan.was_finished) == (0, [3, 4], finish)
    dry = rollback(store, 2, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(1), dry_run=True)
    assert dry == plan
    assert _steps(store) == [1, 2, 3, 4]
    done = rollback(store, 2, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(2))
    assert (done.target, done.dropped, done.was_finished) == (plan.target, plan.dropped, finish)
    assert done.freed_bytes == plan.freed_bytes > before - sum(entry.size_bytes for entry in store.list("data/")) > 0
    assert _steps(store) == [1, 2]
    assert not head_of(store).finished
    assert_clean(store, stores.open)
    with Trainer(store, stores.open, extend=False, seed=3) as trainer:
        assert trainer.restored is not None
        assert trees_equal(trainer.restored, tree_at(2))
        trainer.save(3, tree_at(3, lineage=9))
    assert trees_equal(newest_tree(store, stores.open), tree_at(3, lineage=9))


def test_to_the_newest_of_a_finished_run_only_takes_the_finish_back() -> None:
    store, stores = a_run(finish=True)
    assert rollback(store, "latest", open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(1)).dropped == ()
    assert (_steps(store), head_of(store).finished) == ([1, 2, 3, 4], False)
    with pytest.raises(UsageError, match="nothing to roll back"):
        plan_rollback(store, 4)


def test_a_running_trainer_is_fenced() -> None:
    for act in (_rollback, _drop, _remove):
        store, stores = a_run()
        with Trainer(store, stores.open, keep=None, seed=4) as trainer:
            trainer.save(5)
            act(store, stores)
            with pytest.raises(Fenced):
                trainer.save(6)
        assert 6 not in _steps(store)


def test_a_target_that_does_not_verify_is_refused_and_nothing_changes() -> None:
    store, stores = a_run()
    before = head_of(store)
    store.delete(f"{before.checkpoints[1].name}/part-0")
    with pytest.raises(IntegrityError, match="nothing was changed"):
        _rollback(store, stores, 2)
    assert head_of(store) == before


def test_a_checkpoint_of_an_older_generation_is_refused() -> None:
    store, _ = a_run()
    tokens = seeded_tokens(5)
    open_run(
        store, is_default_url=False, identity="other", fresh=True, extend=False, clock=FakeClock(), tokens=tokens,
        warn=lambda text: None,
    )  # fmt: skip
    with pytest.raises(UsageError, match="Fork it"):
        plan_rollback(store, 2)


@pytest.mark.parametrize("finish", [False, True])
def test_one_checkpoint_is_dropped_and_the_others_stay_whole(finish: bool) -> None:
    store, stores = a_run(finish=finish)
    plan = plan_drop(store, 1)
    done = drop(store, 1, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(1))
    assert done.dropped == plan.dropped
    assert (_steps(store), head_of(store).finished) == ([2, 3, 4], finish)
    assert_clean(store, stores.open)
    for ref in head_of(store).checkpoints:
        assert trees_equal(read_tree(store, ref, stores.open), tree_at(ref.step))
    drop(store, "latest", open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(2))
    assert (_steps(store), head_of(store).finished) == ([2, 3], False)
    drop(store, 2, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(3))
    with pytest.raises(UsageError, match="only checkpoint"):
        plan_drop(store, 3)


def test_a_removed_run_stays_removed() -> None:
    store, stores = a_run()
    store.put("events/1-0-1.jsonl", b"{}\n")
    store.put("notes/wandb", b"id")
    store.put("mine.txt", b"not the run's")
    plan = plan_removal(store, open_home=stores.open)
    done = remove(store, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(1))
    assert (done.objects, done.removed_bytes) == (plan.objects, plan.removed_bytes)
    left = [entry.key for entry in store.list()]
    assert left == [f"heads/{done.head:08d}.json", "mine.txt", "run.json"]
    assert head_of(store).removed
    with pytest.raises(RunRemoved):
        Trainer(store, stores.open)
    for act in (_rollback, _drop):
        with pytest.raises(RunRemoved):
            act(store, stores)
    assert remove(store, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(2)).objects == 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("act", [_rollback, _drop, _remove])
def test_cut_short_at_any_moment_and_done_again(act: Callable[[Store, _Stores], None], after: bool) -> None:
    for at in itertools.count():
        store, stores = a_run()
        crash = Interruptions(at, after=after, crash=True)
        try:
            act(crash.wrap(store), stores)
            break
        except Crash:
            pass
        for ref in head_of(store).checkpoints:
            assert trees_equal(read_tree(store, ref, stores.open), tree_at(ref.step))
        try:
            act(store, stores)
        except UsageError:
            # It had happened already; only the sweep was missing, which the next attempt does.
            assert act in (_rollback, _drop)
            assert _steps(store) == ([1, 2] if act is _rollback else [1, 3, 4])
            _again(store, stores)
        if act is _remove:
            assert [entry.key for entry in store.list()] == [f"heads/{head_of(store).number:08d}.json", "run.json"]
        else:
            assert_clean(store, stores.open)
    assert at > 10


@pytest.mark.parametrize("act", [_rollback, _drop, _remove])
def test_beside_a_trainer_that_saves_at_any_moment(act: Callable[[Store, _Stores], None]) -> None:
    outcomes = set()
    for at in itertools.count():
        store, stores = a_run()
        trainer = Trainer(store, stores.open, keep=3, seed=8)

        def save(trainer: Trainer = trainer) -> None:
            try:
                trainer.save(5)
            except SaveError:
                outcomes.add("failed")
            except Fenced:
                outcomes.add("fenced")

        moment = Interruptions(at, save, after=True)
        try:
            act(moment.wrap(store), stores)
            outcomes.add("done")
        except (RunConflict, UsageError, Fenced) as error:
            outcomes.add(type(error).__name__)
        trainer.close()
        if moment.counted <= at:
            break
        for ref in head_of(store).checkpoints:
            assert trees_equal(read_tree(store, ref, stores.open), tree_at(ref.step))
        if head_of(store).removed:
            _remove(store, stores)
            assert [entry.key for entry in store.list()][-1] == "run.json"
            assert len(list(store.list())) == 2
        else:
            _again(store, stores)
            assert_clean(store, stores.open)
    assert {"done", "fenced"} <= outcomes


def test_a_removal_never_touches_a_run_begun_anew_at_the_same_url() -> None:
    for at in itertools.count():
        store, stores = a_run()
        fresh: list[bool] = []

        def begin(store: Store = store, stores: _Stores = stores, fresh: list[bool] = fresh) -> None:
            if not head_of(store).removed:
                return
            open_run(
                store, is_default_url=False, identity="new", fresh=True, extend=False, clock=FakeClock(),
                tokens=seeded_tokens(31), warn=lambda text: None,
            )  # fmt: skip
            with Trainer(store, stores.open, seed=32) as trainer:
                trainer.save(1, tree_at(1, lineage=4))
            fresh.append(True)

        moment = Interruptions(at, begin, after=True)
        try:
            _remove(moment.wrap(store), stores)
        except Fenced:
            assert fresh
        if moment.counted <= at:
            break
        if fresh:
            assert trees_equal(newest_tree(store, stores.open), tree_at(1, lineage=4))


def test_a_run_that_forks_refer_to_is_removed_only_by_force() -> None:
    store, stores = a_run()
    fork(RUN, FORK, 2, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(21))
    with pytest.raises(RunConflict, match=FORK):
        _remove(store, stores)
    assert _steps(store) == [1, 2, 3, 4]
    assert plan_removal(store, open_home=stores.open).forks == (FORK,)
    # One checkpoint of it may go: its bytes stay for the fork.
    _drop(store, stores, 2)
    assert trees_equal(newest_tree(stores.open(FORK), stores.open), tree_at(2))
    _remove(stores.open(FORK), stores)
    assert list(store.list("pins/")) == []
    _remove(store, stores)
    assert head_numbers(store) == [head_of(store).number]

    store, stores = a_run()
    fork(RUN, FORK, 2, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(22))
    _remove(store, stores, force=True)
    assert len(list(store.list())) == 2


def test_a_fork_at_any_moment_of_a_removal_is_whole_or_is_refused() -> None:
    outcomes = set()
    for at in itertools.count():
        store, stores = a_run()

        def borrow(store: Store = store, stores: _Stores = stores) -> None:
            try:
                fork(RUN, FORK, 2, open_home=stores.open, clock=FakeClock(), tokens=seeded_tokens(23))
                outcomes.add("forked")
            except HoldfastError as error:
                outcomes.add(type(error).__name__)

        moment = Interruptions(at, borrow, after=True)
        try:
            _remove(moment.wrap(store), stores)
        except RunConflict:
            outcomes.add("refused")
        if moment.counted <= at:
            break
        if any(stores.open(FORK).list("heads/")) and head_of(stores.open(FORK)).checkpoints:
            assert trees_equal(newest_tree(stores.open(FORK), stores.open), tree_at(2))
            with Trainer(stores.open(FORK), stores.open, keep=1, seed=92) as trainer:
                trainer.save(6, tree_at(6, frozen=6))
        _remove(store, stores)
        assert len(list(store.list())) == 2
    assert outcomes == {"forked", "refused", "RunRemoved"}
