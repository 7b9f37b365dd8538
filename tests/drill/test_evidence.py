"""What the drill's judgement rests on: differences of two real checkpoints, the count of steps, and words for what is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.core.events import Event
from holdfast.drill.state import Difference, FinalState, compare, newest_state
from holdfast.drill.story import differing_figures, miscounted, story_of
from holdfast.drill.tear import tear_newest
from holdfast.ledger.read import Recorded
from holdfast.store.local import LocalStore


def made(folder: Path, state: dict[str, Any]) -> FinalState:
    """A finished run with one checkpoint of this state."""
    torch.manual_seed(1)
    np.random.seed(1)
    with holdfast.Run(folder, notice="none", seed=1) as run:
        run.track(**state)
        for _ in run.batches([0]):
            pass
    return newest_state(LocalStore(folder))


def state(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
        "count": {"seen": 7, "best": 0.5, "order": [1, 2, 3], "mixed": (1, {"a": None}), 3: "x"},
        "numbers": np.arange(4),
    }
    return whole | changes


def differences(tmp_path: Path, **changes: Any) -> list[Difference]:
    one, other = made(tmp_path / "one", state()), made(tmp_path / "other", state(**changes))
    return [item for item in compare(one, other) if not item.name.startswith("random generators.python")]


def test_equal_states_have_no_differences(tmp_path: Path) -> None:
    assert differences(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "name", "said", "spread"),
    [
        ({"model": state()["model"] | {"weight": torch.arange(6.0).reshape(2, 3) + torch.tensor([0, 0, 0.5])}},
         "model.weight", "f32[2, 3]: 2 of 6 elements differ, by 0.5 at most", 0.5 / 5.5),
        ({"model": state()["model"] | {"half": torch.tensor([1, 1.5, 1], dtype=torch.bfloat16)}},
         "model.half", "bf16[3]: 1 of 3 elements differ, by 0.5 at most", 0.5 / 1.5),
        ({"model": state()["model"] | {"weight": torch.tensor([[0, 1, math.nan], [3, 4, 5]])}},
         "model.weight", "1 of 6 elements differ, by inf at most", math.inf),
        ({"numbers": np.array([0, 1, 2, 4])}, "numbers", "1 of 4 elements differ, by 1 at most", math.inf),
        ({"numbers": np.arange(5)}, "numbers", "i64[4] and i64[5]", math.inf),
        ({"count": state()["count"] | {"seen": 8}}, "count.seen", "7 and 8", math.inf),
        ({"count": state()["count"] | {"best": 1.0}}, "count.best", "0.5 and 1", 0.5),
        ({"count": state()["count"] | {"order": [1, 9, 3]}}, "count.order", "first at index 1", math.inf),
        ({"count": state()["count"] | {"order": [1, 2]}}, "count.order", "the same up to index 2", math.inf),
        ({"count": state()["count"] | {"mixed": (1, {"a": 2})}}, "count.mixed.1.a", "None and 2", math.inf),
        ({"count": state()["count"] | {4: "y"}}, "count.4", "only the second has it", math.inf),
    ],
)  # fmt: skip
def test_each_difference_is_named(tmp_path: Path, change: dict[str, Any], name: str, said: str, spread: float) -> None:
    (found,) = differences(tmp_path, **change)
    assert found.name == name
    assert said in found.text
    assert found.spread == pytest.approx(spread)


@pytest.mark.parametrize("flip", [True, False])
def test_torn_is_what_a_restore_falls_back_from(tmp_path: Path, flip: bool) -> None:
    def train(until: int) -> int:
        weights = {"w": torch.zeros(300)}
        with holdfast.Run(tmp_path / "run", notice="none", save_every="1 step", extend=True) as run:
            run.track(weights=weights)
            run.restore()
            began = run.step
            for number in run.batches(range(5)):
                weights["w"] += 1
                if number + 1 == until:
                    break
        assert weights["w"].tolist() == [float(until)] * 300
        return began

    # Each end makes a checkpoint for certain; those of a step may be overtaken by the next.
    assert train(2) == 0
    assert train(3) == 2
    kept = [ref.step for ref in newest_state(LocalStore(tmp_path / "run")).head.checkpoints]
    assert tear_newest(tmp_path / "run", flip=flip) is not None
    with pytest.warns(holdfast.HoldfastWarning, match="passed over"):
        assert train(5) == kept[-2]


def event(attempt: int, name: str, node: str = "0", **fields: Any) -> Recorded:
    return Recorded(attempt, node, Event(name, 0.0, fields))


def test_steps_are_counted_along_the_surviving_lineage() -> None:
    sound = [
        event(1, "attempt.started", step=0, restored=None),
        event(1, "save.committed", checkpoint="c4", step=4),
        event(1, "save.committed", checkpoint="c8", step=8),
        event(2, "attempt.started", step=4, restored="c4"),
        event(3, "attempt.started", step=9, restored="of an agent"),
    ]
    assert miscounted(story_of(sound)) == []
    (skipped,) = miscounted(story_of([*sound[:3], event(2, "attempt.started", step=10, restored="c8")]))
    assert "2 steps are skipped" in skipped
    (repeated,) = miscounted(story_of([*sound[:3], event(2, "attempt.started", step=5, restored="c8")]))
    assert "3 steps are repeated" in repeated
    (begun,) = miscounted(story_of([event(1, "attempt.started", step=3, restored=None)]))
    assert "without a checkpoint" in begun


def test_how_each_attempt_says_that_it_left() -> None:
    told = [
        event(1, "attempt.leaving", code=75, drained=True, notice_to_durable_s=0.25),
        event(2, "attempt.leaving", code=75, drained=False, notice_to_durable_s=None),
        event(3, "attempt.failed", error="RuntimeError: no"),
        event(4, "attempt.fenced", error="Fenced: by 5"),
        event(5, "attempt.finished"),
    ]
    story = story_of(told)
    assert story.ends == {1: 75, 2: 75, 4: 76, 5: 0}
    assert story.notice_to_durable_s == 0.25


def test_the_first_figure_that_differs_and_where_its_attempt_began() -> None:
    losses = [event(1, "metrics", step=k, values={"loss": k / 2}) for k in range(9)]
    before = story_of([event(1, "attempt.started", step=0, restored=None), *losses])
    lost_and_right = [
        event(1, "metrics", step=5, values={"loss": "nan"}),
        event(2, "attempt.started", step=4, restored="c4"),
        *(event(2, "metrics", step=k, values={"loss": k / 2}) for k in range(4, 9)),
    ]
    assert differing_figures(before, story_of(lost_and_right)) is None
    wrong = [*lost_and_right, event(2, "metrics", step=7, values={"loss": 3.6})]
    found = differing_figures(before, story_of(wrong))
    assert found is not None
    assert (found.step, found.name, found.before, found.now, found.attempt, found.resumed_at) == (
        7,
        "loss",
        3.5,
        3.6,
        2,
        4,
    )
    assert differing_figures(before, story_of(wrong), tolerance=0.1) is None
