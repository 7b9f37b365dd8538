"""What an attempt learns of those before it: how often it was taken away, whether that was announced, what a save costs."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os
import signal

import pytest
import torch
from run_parts import Killed, Stores

import holdfast
from holdfast import Preempted
from holdfast.testing.clock import ManualClock
from holdfast.train.history import History

HOUR_S = 3600.0


def attempt(stores: Stores, clock: ManualClock, ending: str, save_every: str) -> History:
    """Four steps of an hour each; then what `ending` says. What it knew at its start."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = holdfast.Run("./run", save_every=save_every, open_store=stores, clock=clock)
    with run:
        run.track(model=model, optimizer=optimizer)
        run.restore()
        known = run._session._history
        for number, _ in enumerate(run.batches(list(range(100)))):
            if number == 4 and ending == "killed":
                raise Killed
            optimizer.zero_grad()
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            clock.advance(HOUR_S)
            if number == 3 and ending == "told":
                os.kill(os.getpid(), signal.SIGTERM)
            if number == 3 and ending == "stopped":
                break
    return known


def test_it_goes_from_checkpoint_to_checkpoint() -> None:
    stores, clock = Stores(), ManualClock()
    with pytest.raises(Killed):
        attempt(stores, clock, "killed", "1 step")
    with pytest.raises(Preempted):
        attempt(stores, clock, "told", "1 day")
    known = attempt(stores, clock, "stopped", "1 day")
    assert (known.starts, known.preemptions, known.noticed) == (3, 2, 1)
    # Time that nothing was saved in is not known of.
    assert known.exposure_s == pytest.approx(8 * HOUR_S, abs=HOUR_S)
    assert known.save_cost_s is not None
    assert known.rate.notice_share == pytest.approx(1 / 3)


def test_what_ended_by_itself_was_not_taken_away() -> None:
    run = "A1"
    here = History(starts=2, preemptions=1, exposure_s=10.0, save_cost_s=0.5)
    finished = here.written(run, 5.0, None, leaves=False, finishes=True)
    assert History.after(finished, run) == History(3, 1, 0, 15.0, 0.5)
    died = here.written(run, 5.0, 0.7, leaves=False, finishes=False)
    assert History.after(died, run) == History(3, 2, 0, 15.0, 0.7)
    left = here.written(run, 5.0, 0.7, leaves=True, finishes=False)
    assert History.after(left, run) == History(3, 2, 1, 15.0, 0.7)


def test_another_run_is_taken_away_anew() -> None:
    there = History(9, 8, 7, 6.0, 5.0).written("A1", 1.0, None, leaves=False, finishes=False)
    assert History.after(there, "B2") == History(save_cost_s=5.0)
    assert History.after({}, "B2") == History()
