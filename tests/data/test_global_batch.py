"""Stretches and micro-batches: over any history of world sizes every sample of an epoch is taken once, and counts the same."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.data.batch_plan import plan_batch
from holdfast.data.global_batch import EpochCut, check_global_batch, micro_batches, stretch

EPOCHS = 3
WORLDS = st.tuples(st.integers(1, 9), st.integers(0, 40), st.integers(1, 9), st.integers(1, 4))
"""World size, how much the global batch is larger than that, the largest micro-batch, steps until the next change."""


def one_step(batch_samples: int, world_size: int, most: int) -> list[int]:
    """Which samples of the global batch are taken, in the order of ranks; checks everything that holds for one step."""
    ranks = [micro_batches(batch_samples, rank=rank, world_size=world_size, most=most) for rank in range(world_size)]
    assert len({len(pieces) for pieces in ranks}) == 1, "every rank enters the collectives equally often"
    taken: list[int] = []
    weight = 0.0
    for pieces in ranks:
        assert [piece.micro.last for piece in pieces] == [*[False] * (len(pieces) - 1), True]
        for index, piece in enumerate(pieces):
            micro, places = piece.micro, range(piece.start, piece.stop)
            assert (micro.index, micro.count, micro.batch_samples) == (index, len(pieces), batch_samples)
            assert 1 <= len(places) <= most
            assert max(places) < batch_samples, "padding repeats a sample of this batch"
            if micro.is_padding:
                assert (micro.weight, len(places)) == (0, 1)
            else:
                assert micro.samples == len(places)
                assert micro.weight / len(places) / world_size == pytest.approx(1 / batch_samples)
                taken.extend(places)
            weight += micro.weight
        sizes = [piece.micro.samples or 0 for piece in pieces]
        assert max(sizes) - min(sizes) <= 1
    assert weight == pytest.approx(world_size)
    return taken


@given(samples=st.integers(1, 150), history=st.lists(WORLDS, min_size=11, max_size=16))
def test_every_sample_once_per_epoch_over_any_change(samples: int, history: list[tuple[int, int, int, int]]) -> None:
    changes = 0
    for epoch in range(EPOCHS):
        seen: Counter[int] = Counter()
        consumed = 0
        while consumed < samples:
            world_size, larger, most, steps = history[changes % len(history)]
            cut = EpochCut(world_size + larger)
            for _ in range(steps):
                if batch_samples := cut.next_batch(samples, consumed):
                    taken = one_step(batch_samples, world_size, most)
                    assert taken == list(range(batch_samples)), "contiguous, in the order of the ranks"
                    seen.update(consumed + place for place in taken)
                    consumed += batch_samples
            changes += 1
        assert seen == Counter(range(samples)), f"epoch {epoch}"


@given(
    samples=st.integers(0, 200), size=st.integers(1, 40), even=st.integers(1, 9), consumed=st.integers(0, 200),
    drop_last=st.booleans(),
)  # fmt: skip
def test_what_a_tail_leaves_out(samples: int, size: int, even: int, consumed: int, drop_last: bool) -> None:
    cut = EpochCut(size, drop_last, even)
    steps, at = 0, 0
    while batch_samples := cut.next_batch(samples, at):
        assert batch_samples == size or (not drop_last and batch_samples % even == 0)
        at, steps = at + batch_samples, steps + 1
    assert steps == cut.batches(samples)
    assert samples - at < (size if drop_last else even)
    assert cut.next_batch(samples, samples + consumed) == 0


@given(samples=st.integers(0, 1000), parts=st.integers(1, 50))
def test_stretches_follow_each_other(samples: int, parts: int) -> None:
    stretches = [stretch(samples, parts, part) for part in range(parts)]
    assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
    assert stretches[-1][1] == samples
    lengths = [stop - start for start, stop in stretches]
    assert sorted(lengths, reverse=True) == lengths
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("wrong", "words"), [(3, "at least one sample on each rank"), (0, "at least"), (-8, "at least"),
                                              (8.0, "an integer"), (True, "an integer"), ("8", "an integer")])  # fmt: skip
def test_what_is_no_global_batch_is_refused(wrong: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_global_batch(wrong, 4)


@given(st.integers(1, 9), st.integers(0, 500), st.integers(1, 40))
def test_a_plan_keeps_the_global_batch_and_is_what_the_ranks_do(world_size: int, larger: int, fits: int) -> None:
    plan = plan_batch(world_size + larger, world_size, micro_batch=fits)
    by_memory = plan_batch(world_size + larger, world_size, memory_bytes_per_sample=10, memory_bytes=10 * fits + 9)
    assert by_memory.reasons[1:] == plan.reasons[1:]
    assert plan.micro_batch <= fits
    with_plan = micro_batches(plan.global_batch, rank=0, world_size=world_size, most=plan.micro_batch)
    assert (
        len(with_plan)
        == plan.accumulation
        == len(micro_batches(plan.global_batch, rank=0, world_size=world_size, most=fits))
    ), "the fewest that fit"
    assert max(piece.micro.samples or 0 for piece in with_plan) == plan.micro_batch


def test_a_plan_says_why_and_refuses_what_cannot_be() -> None:
    plan = plan_batch(512, 3, memory_bytes_per_sample=1 << 30, memory_bytes=40 << 30)
    assert (plan.micro_batch, plan.accumulation) == (35, 5)
    assert plan.reasons == (
        "40 GiB of memory for samples, 1 GiB for each: 40 fit",
        "512 samples over 3 ranks: 171 on the rank that has the most",
        "5 micro-batches of at most 35: the fewest that fit, of equal size",
        "sizes differ by one sample between micro-batches: weigh each loss with run.micro.weight",
    )
    with pytest.raises(UsageError, match="one of them"):
        plan_batch(8, 2)
    with pytest.raises(UsageError, match="one of them"):
        plan_batch(8, 2, micro_batch=2, memory_bytes_per_sample=3, memory_bytes=9)
    with pytest.raises(UsageError, match="free memory"):
        plan_batch(8, 2, memory_bytes_per_sample=10, memory_bytes=9)
    with pytest.raises(UsageError, match="pass micro_batch="):
        plan_batch(8, 2, memory_bytes_per_sample=10)
    for wrong in (0, float("inf"), float("nan"), "1 GiB"):
        with pytest.raises(UsageError, match="number of bytes"):
            plan_batch(8, 2, memory_bytes_per_sample=wrong, memory_bytes=9)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="integer from 1"):
        plan_batch(8, 2, micro_batch=0)
