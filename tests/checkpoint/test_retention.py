"""Which checkpoints stay, and what happens when the store is full of what nobody needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interleaved import RUN_ID
from parts import begin, garbage, restore

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import SaverOptions
from holdfast.core.errors import SaveError, StoreFull, UsageError
from holdfast.store.base import Body, flat_buffers
from holdfast.store.memory import MemoryStore


def ref(step: int, *, unix_s: float = 0.0, figure: float | None = None, generation: int = 1) -> CheckpointRef:
    return CheckpointRef(
        name=f"checkpoints/{step:08d}-1-x", root_blake3="", step=step, epoch=0, generation=generation, attempt=1, unix_s=unix_s,
        total_bytes=0, figure=figure,
    )  # fmt: skip


def retained(keep: Keep, made: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """What is left after every commit has applied the rules."""
    left: list[CheckpointRef] = []
    for checkpoint in made:
        left = keep.select([*left, checkpoint], checkpoint.generation)
    return left


FIGURES = st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3).map(float))
HISTORIES = st.lists(st.tuples(st.floats(0.1, 1000.0), FIGURES), min_size=1, max_size=30)


@given(history=HISTORIES, last=st.integers(1, 4), count=st.integers(1, 3), mode=st.sampled_from(["min", "max"]))
def test_rules_applied_at_every_commit_give_what_they_say_of_the_whole_history(
    history: list[tuple[float, float | None]], last: int, count: int, mode: str
) -> None:
    """Although each commit sees only what the ones before have left."""
    now_s, made = 0.0, []
    for step, (pause_s, figure) in enumerate(history):
        now_s += pause_s
        made.append(ref(step, unix_s=now_s, figure=figure))
    left = retained(Keep(last=last, every="5 min", best="loss", best_count=count, mode=mode), made)  # type: ignore[arg-type]
    assert left == sorted(left, key=lambda checkpoint: checkpoint.step)

    newest = made[-last:]
    spaced = [made[0]]
    for checkpoint in made:
        if checkpoint.unix_s - spaced[-1].unix_s >= 300.0:
            spaced.append(checkpoint)
    sign = 1.0 if mode == "min" else -1.0
    first_of: dict[float, CheckpointRef] = {}
    for checkpoint in made:
        if checkpoint.figure is not None and not math.isnan(checkpoint.figure):
            first_of.setdefault(checkpoint.figure, checkpoint)
    best = sorted(first_of.values(), key=lambda checkpoint: sign * (checkpoint.figure or 0.0))[:count]

    wanted = {checkpoint.step for checkpoint in (*newest, *spaced, *best)}
    assert {checkpoint.step for checkpoint in left} >= wanted
    # Nothing else stays, but for a figure that has come again while its first holder was still there for another reason.
    extra = {checkpoint.step for checkpoint in left} - wanted
    assert all(made[step].figure in first_of for step in extra)


def test_the_last_of_an_older_generation_stays() -> None:
    made = [ref(1), ref(2), ref(3, generation=2), ref(4, generation=2), ref(5, generation=2)]
    assert [checkpoint.step for checkpoint in retained(Keep(1), made)] == [2, 5]


@pytest.mark.parametrize("wrong", [{"last": 0}, {"best_count": 0}, {"mode": "least"}, {"every": "soon"}])
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Keep(**wrong)  # type: ignore[arg-type]


class SmallStore(MemoryStore):
    """Holds no more data than its capacity."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self.capacity_bytes = capacity_bytes

    def put(self, key: str, body: Body) -> None:
        size_bytes = sum(len(buffer) for buffer in flat_buffers(body))
        used_bytes = sum(entry.size_bytes for entry in self.list("data/"))
        if key.startswith("data/") and used_bytes + size_bytes > self.capacity_bytes:
            raise StoreFull(f"no room for {size_bytes} bytes")
        super().put(key, body)


def state(value: int) -> dict[str, np.ndarray]:
    return {"weights": np.full(50_000, value, dtype=np.int32)}


def test_a_store_full_of_orphans_is_swept_and_the_save_goes_through() -> None:
    store = SmallStore(550_000)
    first = begin(store, options=SaverOptions(keep=Keep(1)))
    first.save(state(1), 1)
    first.saver.close()
    store.put("data/1/torn", bytes(300_000))
    second = begin(store, options=SaverOptions(keep=Keep(1)))
    second.save(state(2), 2)
    second.saver.close()
    assert restore(store)["weights"][0] == 2
    assert not garbage(store)


def test_a_save_that_does_not_fit_leaves_nothing_behind_and_the_checkpoint_before_it() -> None:
    store = SmallStore(350_000)
    attempt = begin(store, options=SaverOptions(keep=Keep(1)))
    attempt.save(state(1), 1)
    before = {entry.key for entry in store.list()}
    for step in (2, 3):
        with pytest.raises(SaveError, match="no room"):
            attempt.save(state(step), step)
    attempt.saver.close()
    assert {entry.key for entry in store.list("data/")} == {key for key in before if key.startswith("data/")}
    head = read_truth(store, RUN_ID).head
    assert head is not None
    assert [checkpoint.step for checkpoint in head.checkpoints] == [1]
    assert restore(store)["weights"][0] == 1
