"""Saves that are asked for, saves that fail, and leaving on a signal: what is kept, and what is said."""

# What raises or warns here is a whole run, which takes more than one statement.
# ruff: noqa: PT012, PT031
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import run_parts as parts
import torch
from run_parts import Killed, Stores, run_once, until

import holdfast
from holdfast import HoldfastWarning, Preempted, SaveError, TooManyUnsaved, UsageError
from holdfast.core.contract import EXIT_INTERRUPTED, EXIT_PREEMPTED
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation


def steps(stores: Stores) -> list[int]:
    return [ref.step for ref in stores.checkpoints()]


def opened(stores: Stores, **options: Any) -> holdfast.Run:
    run = holdfast.Run("./run", save_every=options.pop("save_every", "1 h"), keep=None, open_store=stores, **options)
    run.track(state={"n": 0})
    return run


def strike(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# ---- saves that are asked for


def test_saves_are_made_where_a_resume_repeats_nothing() -> None:
    """Inside an iteration at its end; between two loops at the end of the epoch; outside of loops now."""
    stores = Stores()
    with opened(stores) as run:
        assert run.save().wait().step == 0
        for _ in run.epochs(2):
            handles = []
            for _ in run.batches([1, 2, 3]):
                if run.batch == 1:
                    handles += [run.save(), run.save()]
                    assert handles[0] is handles[1]
                    with pytest.raises(UsageError, match="iteration of the loop is complete"):
                        handles[0].wait()
            # What a newer snapshot replaced while it waited is not made any more.
            assert handles[0].wait().step in (run.step - 1, run.step)
            between = run.save()
            with pytest.raises(UsageError, match="iteration of the loop is complete"):
                between.wait(0.1)
        assert between.wait().step == 6
        assert run.save().wait().step == 6
    assert set(steps(stores)) <= {0, 2, 3, 5, 6}
    assert (stores.checkpoints()[-1].step, stores.checkpoints()[-1].epoch) == (6, 2)


def test_a_save_between_loops_belongs_to_the_end_of_the_epoch() -> None:
    """Otherwise what comes after the loop, a step of a scheduler for instance, would be done twice."""
    stores = Stores()
    model = torch.nn.Linear(1, 1)

    def attempt(dies: bool) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        rates: list[float] = []
        with holdfast.Run("./run", save_every="1 h", open_store=stores) as run:
            run.track(optimizer=optimizer, scheduler=scheduler, rates=rates)
            for epoch in run.epochs(3):
                if dies and epoch == 1:
                    raise Killed
                for _ in run.batches([1]):
                    optimizer.step()
                scheduler.step()
                run.save()
                rates.append(optimizer.param_groups[0]["lr"])
        return rates

    with pytest.raises(Killed):
        attempt(dies=True)
    assert attempt(dies=False) == [0.5, 0.25, 0.125]


def test_a_save_that_was_asked_for_and_never_made_fails() -> None:
    stores = Stores()
    with pytest.raises(ZeroDivisionError), opened(stores) as run:
        for _ in run.batches([1, 2]):
            handle = run.save()
            raise ZeroDivisionError
    with pytest.raises(SaveError, match="before the iteration was complete"):
        handle.wait()
    assert steps(stores) == []
    for use in (run.save, run.restore):
        with pytest.raises(UsageError, match="closed"):
            use() if use == run.save else opened_and_closed().restore()


def opened_and_closed() -> holdfast.Run:
    run = opened(Stores())
    run.close()
    return run


def test_a_break_makes_the_pending_save_at_the_next_boundary() -> None:
    stores = Stores()
    with opened(stores) as run:
        for _ in run.batches([1, 2, 3]):
            handle = run.save()
            break
        assert handle.wait().step == 1
    assert steps(stores) == [1, 1]


@pytest.mark.parametrize("end", [ZeroDivisionError, SystemExit, Killed, KeyboardInterrupt])
def test_no_checkpoint_comes_of_an_error_in_a_step(end: type[BaseException]) -> None:
    stores = Stores()
    with pytest.raises(end), opened(stores, save_every="1 step") as run:
        for _ in run.epochs(2):
            for _ in run.batches([1, 2, 3]):
                if run.step == 4:
                    run.save()
                    raise end
    assert all(step <= 4 for step in steps(stores))
    head = holdfast.Run("./run", open_store=stores)
    head.track(state={"n": 0})
    assert not head.finished
    head.close()


def test_saves_wait_for_accumulated_gradients_and_for_mutations() -> None:
    stores = Stores()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with holdfast.Run("./run", save_every="1 step", keep=None, open_store=stores) as run:
        run.track(model=model, optimizer=optimizer)
        for index in run.batches(list(range(7))):
            model(torch.ones(1, 1)).sum().backward()
            if index % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        with pytest.raises(UsageError, match="complete"), run.mutating():
            run.save().wait()
        assert set(steps(stores)) <= {3, 6}
    assert stores.checkpoints()[-1].step == 7


def test_a_save_that_is_put_off_for_long_is_told() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(HoldfastWarning, match="'optimizer' keeps collecting gradients") as told,
        holdfast.Run("./run", save_every="1 step", open_store=Stores()) as run,
    ):
        run.track(model=model, optimizer=optimizer)
        for _ in run.batches(list(range(600))):
            model(torch.ones(1, 1)).sum().backward()
    assert len(told) == 1


# ---- saves that fail


def failing(fails: Callable[[Operation], bool]) -> tuple[Stores, list[FaultyStore]]:
    made: list[FaultyStore] = []

    def make() -> FaultyStore:
        plan = lambda operation: Fault.FULL if operation.method == "put" and fails(operation) else None  # noqa: E731
        made.append(FaultyStore(MemoryStore(), plan))
        return made[-1]

    return Stores(make), made


def test_failed_saves_warn_and_then_raise_at_a_boundary() -> None:
    stores, _ = failing(lambda operation: operation.key.startswith("data/"))
    done = 0
    handle: holdfast.SaveHandle | None = None
    with (
        pytest.warns(HoldfastWarning, match="The run goes on") as told,
        pytest.raises(TooManyUnsaved, match="3 saves in a row"),
        opened(stores, max_unsaved=2) as run,
    ):
        for _ in run.batches(list(range(50))):
            done = run.step
            if handle is not None:
                until(handle.done)
            handle = run.save()
    assert done < 10
    assert len(told) == 3
    assert {warning.filename for warning in told} == {__file__}
    assert steps(stores) == []


def test_a_store_that_is_full_at_the_end_fails_the_run_loudly() -> None:
    full = False
    stores, _ = failing(lambda operation: full and operation.key.startswith("data/"))
    with pytest.raises(SaveError, match="step 3"), opened(stores) as run:
        run.restore()
        for _ in run.batches([1, 2, 3]):
            full = True
    full = False
    again = opened(stores)
    assert not again.finished
    again.close()


def test_a_failed_save_is_tried_again_when_leaving() -> None:
    failures = iter([True])
    stores, _ = failing(lambda operation: operation.key.startswith("data/") and next(failures, False))
    with pytest.raises(Preempted), warnings.catch_warnings(), opened(stores) as run:
        warnings.simplefilter("ignore", HoldfastWarning)
        for _ in run.batches([1, 2, 3]):
            if run.step == 1:
                strike()
    assert steps(stores) == [2]


# ---- signals


def test_sigterm_in_a_step_saves_at_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    stores = Stores()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as left, opened(stores) as run:
        for _ in run.batches([1, 2, 3]):
            if run.step == 1:
                strike()
    assert (left.value.code, steps(stores)) == (EXIT_PREEMPTED, [2])
    assert signal.getsignal(signal.SIGTERM) is before
    assert "leaving at step 2 with exit code 75; start the same command again" in capfd.readouterr().err


class Stuck:
    """A loader that is asked for a batch that never comes: the notice arrives meanwhile."""

    def __init__(self, *, sticks: bool) -> None:
        self.sticks = sticks

    def __iter__(self) -> Iterator[int]:
        yield 1
        yield 2
        if self.sticks:
            threading.Timer(0.05, strike).start()
            threading.Event().wait(60)
        yield 3


def test_sigterm_while_waiting_for_data_leaves_without_it() -> None:
    stores = Stores()
    parts.seeded()
    drawn = []
    with pytest.raises(Preempted), opened(stores) as run:
        for _ in run.batches(Stuck(sticks=True)):
            drawn.append(float(torch.rand(1)))
    assert steps(stores) == [2]
    parts.seeded()
    state = torch.get_rng_state()
    assert drawn == [float(torch.rand(1)), float(torch.rand(1))]
    following = torch.rand(1)
    torch.set_rng_state(state)
    with warnings.catch_warnings(), opened(stores) as run:
        warnings.simplefilter("ignore", HoldfastWarning)
        for _ in run.batches(Stuck(sticks=False)):
            assert torch.equal(torch.rand(1), following)
    assert steps(stores)[-1] == 3


@pytest.mark.parametrize("told", ["waiting", "evaluating", "before"])
def test_a_second_sigterm_does_not_break_off_the_last_save(told: str) -> None:
    """A launcher passes on what its whole group has got: ranks hear it twice."""
    noticed = []

    def during_the_save(operation: Operation) -> bool:
        if noticed and operation.key.startswith("data/"):
            strike()
        return False

    def notice(where: str) -> None:
        if told == where:
            noticed.append(where)
            strike()

    def batches() -> Iterator[int]:
        yield from (1, 2)
        notice("waiting")

    stores, _ = failing(during_the_save)
    with pytest.raises(Preempted), opened(stores) as run:
        for _ in run.batches(batches()):
            pass
        notice("before")
        with run.evaluating():
            notice("evaluating")
    assert noticed
    assert steps(stores) == [2]


def test_sigterm_between_loops_leaves_at_the_end_of_the_epoch() -> None:
    stores = Stores()
    after = []
    with pytest.raises(Preempted), opened(stores) as run:
        for epoch in run.epochs(3):
            for _ in run.batches([1, 2]):
                pass
            if epoch == 1:
                strike()
            after.append(epoch)
    assert (steps(stores), after) == ([4], [0, 1])
    assert stores.checkpoints()[-1].epoch == 2


def test_sigterm_in_an_evaluation_ends_it_and_saves_the_state_before() -> None:
    stores = Stores()
    state = {"evaluations": 0, "tail": 0}
    reached = []
    with pytest.raises(Preempted), holdfast.Run("./run", save_every="1 h", open_store=stores) as run:
        run.track(state=state)
        for _ in run.epochs(2):
            for _ in run.batches([1, 2]):
                pass
            with run.evaluating():
                state["evaluations"] += 100
                strike()
                reached.append("the rest of the evaluation")
    assert (steps(stores), reached) == ([2], [])
    with holdfast.Run("./run", save_every="1 h", open_store=stores) as run:
        run.track(state=state)
        for _ in run.epochs(2):
            for _ in run.batches([1, 2]):
                pass
            with run.evaluating(), run.mutating():
                state["evaluations"] += 1
    assert state == {"evaluations": 2, "tail": 0}


def test_sigterm_in_an_evaluation_after_all_loops_or_inside_an_iteration_loses_nothing() -> None:
    stores = Stores()
    with pytest.raises(Preempted), opened(stores) as run:
        for _ in run.batches([1, 2]):
            pass
        with run.evaluating():
            strike()
    assert steps(stores) == [2]
    stores = Stores()
    ended = []
    with pytest.raises(Preempted), opened(stores) as run:
        for _ in run.batches([1, 2]):
            with run.evaluating():
                strike()
                ended.append(run.step)
    assert (steps(stores), ended) == ([1], [0])


def test_sigterm_after_the_last_step_finishes() -> None:
    stores = Stores()
    with opened(stores) as run:
        for _ in run.batches([1, 2]):
            pass
        strike()
    again = opened(stores)
    assert again.finished
    again.close()


def test_one_ctrl_c_saves_and_two_leave_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    stores = Stores()
    with pytest.raises(Preempted) as left, opened(stores) as run:
        for _ in run.batches([1, 2, 3]):
            strike(signal.SIGINT)
    assert (left.value.code, steps(stores)) == (EXIT_INTERRUPTED, [1])
    assert "Ctrl-C again leaves at once" in capfd.readouterr().err
    stores = Stores()
    with pytest.raises(KeyboardInterrupt), opened(stores) as run:
        for _ in run.batches([1, 2, 3]):
            strike(signal.SIGINT)
            strike(signal.SIGINT)
    assert steps(stores) == []


def test_a_signal_during_accumulation_waits_for_the_optimizer() -> None:
    stores = Stores()

    def make() -> parts.Training:
        training = parts.accumulating(3)
        inner = training.step

        def step(run: holdfast.Run, x: torch.Tensor, y: torch.Tensor) -> None:
            if run.step == 3:
                strike()
            inner(run, x, y)

        training.step = step
        return training

    with pytest.raises(Preempted):
        run_once(make, stores, save_every="1 h")
    assert steps(stores) == [6]
    assert run_once(lambda: parts.accumulating(3), stores) == run_once(lambda: parts.accumulating(3), Stores())


def test_a_run_that_was_only_restored_is_left_as_it_was() -> None:
    stores = Stores()
    with pytest.raises(Killed):
        run_once(parts.plain, stores, kill_in_step=4)
    before = steps(stores)
    training = parts.plain()
    with holdfast.Run("./run", open_store=stores) as run:
        run.track(**training.tracked)
        assert run.restore()
    assert steps(stores) == before
    assert run_once(parts.plain, stores) == run_once(parts.plain, Stores())
