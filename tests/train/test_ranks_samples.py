"""Many ranks over one order: over any history of worlds every sample comes once per epoch, in the order and with the
augmentation of one rank that was never interrupted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from loader_parts import SAMPLES, Augmented, BucketBatches, LazySampler, Stream, StreamOfPlaces, masking
from rank_parts import MakeLoader, Rank, Row, job, step_of
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast.core.errors import UsageError

EPOCHS = 5
BATCHLESS = ("one-by-one", "bucket-batches")
"""Loaders without batches of a fixed size."""


def distributed(rank: int, world_size: int, **options: Any) -> DistributedSampler[Any]:
    return DistributedSampler(Augmented(), num_replicas=world_size, rank=rank, **options)


def shard(rank: int, world_size: int, **options: Any) -> BatchSamplerShard:
    return BatchSamplerShard(BatchSampler(RandomSampler(Augmented()), 4, False), world_size, rank, **options)


LOADERS: dict[str, MakeLoader] = {
    "sequential": lambda r, w: DataLoader(Augmented(), 3),
    "shuffled": lambda r, w: DataLoader(Augmented(), 2, shuffle=True),
    "one-by-one": lambda r, w: DataLoader(Augmented(), None, shuffle=True),
    "by-hand": lambda r, w: DataLoader(Augmented(), 12 // w, shuffle=True),
    "single-samples": lambda r, w: DataLoader(Augmented(), 1, shuffle=True),
    "distributed": lambda r, w: DataLoader(Augmented(), 3, sampler=distributed(r, w)),
    "distributed-sequential": lambda r, w: DataLoader(Augmented(), 2, sampler=distributed(r, w, shuffle=False)),
    "accelerate": lambda r, w: DataLoader(Augmented(), batch_sampler=shard(r, w)),
    "weighted": lambda r, w: DataLoader(Augmented(), 3, sampler=WeightedRandomSampler([0.1] * 5 + [5.0] * 18, 19)),
    "lazy-sampler": lambda r, w: DataLoader(Augmented(), 3, sampler=LazySampler()),
    "bucket-batches": lambda r, w: DataLoader(Augmented(), batch_sampler=BucketBatches()),
    "subset": lambda r, w: DataLoader(Subset(Augmented(), range(2, 20)), 2, shuffle=True),
    "workers": lambda r, w: DataLoader(Augmented(), 3, shuffle=True, num_workers=1, persistent_workers=True),
}


def history(
    make: MakeLoader, worlds: Iterator[int], steps: Callable[[], int], options: Callable[[int], dict[str, Any]]
) -> tuple[list[list[Row]], int]:
    """What each epoch took when the world changes after every few steps, and how often it changed."""
    epochs: list[list[Row]] = [[]]
    states: list[dict[str, Any]] | None = None
    changes = -1
    while True:
        world_size = next(worlds)
        ranks = job(world_size, make, states, epochs=EPOCHS, **options(world_size))
        changes += 1
        for _ in range(steps()):
            taken = step_of(ranks)
            if taken is None:
                if ranks[0].ended:
                    return epochs, changes
                epochs.append([])
            else:
                epochs[-1].extend(taken)
        states = [rank.place.state() for rank in ranks]


def one_rank(make: MakeLoader) -> list[list[Row]]:
    epochs, _ = history(make, cycle([1]), lambda: 10_000, lambda _: {})
    return epochs


@pytest.mark.parametrize(
    ("name", "accumulates"),
    [
        (name, accumulates)
        for name in LOADERS
        for accumulates in (False, True)
        if not accumulates or name not in BATCHLESS
    ],
)
def test_any_history_of_worlds_is_one_rank_s_epoch(name: str, accumulates: bool) -> None:
    make = LOADERS[name]
    luck = random.Random(name)
    few = name == "workers"
    worlds = cycle([2, 3] if few else [2, 3, 1, 4, 7, 2, 2, 5])

    def options(world_size: int) -> dict[str, Any]:
        return {"global_batch": luck.randint(world_size, 12)} if accumulates else {}

    def steps() -> int:
        return 5 if few else luck.choice([0, 1, 1, 2])

    ran, changes = history(make, worlds, steps, options)
    assert ran == one_rank(make)
    assert changes >= (3 if few else 10)
    if name not in ("weighted", "lazy-sampler"):
        for epoch in ran:
            assert len({row[0] for row in epoch}) == len(epoch) == (18 if name == "subset" else SAMPLES)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda r, w: DataLoader(Augmented(), 2, shuffle=True, drop_last=True), [6, 6, 6]),
        (lambda r, w: DataLoader(Augmented(), 4, sampler=distributed(r, w, drop_last=True)), [12, 9]),
    ],
    ids=["loader", "distributed-sampler"],
)
def test_the_tail_is_dropped_as_the_script_says(make: MakeLoader, steps: list[int]) -> None:
    whole = one_rank(LOADERS["shuffled"])[0]
    ranks = job(3, make, None)
    took = [step_of(ranks) or [] for _ in steps]
    assert [row for step in took for row in step] == whole[: sum(steps)]
    assert [len(step) for step in took] == steps
    assert {rank.place.current.batches_per_epoch for rank in ranks if rank.place.current} == {len(steps)}
    states = [rank.place.state() for rank in ranks]
    assert step_of(ranks) is None
    # The epoch that three ranks have ended stays over for one, although it could take one more batch.
    (alone,) = job(1, make, states)
    assert alone.step() is None
    assert alone.place.position.epoch == 1


def test_a_loader_of_fewer_samples_than_ranks() -> None:
    ranks = job(4, lambda r, w: DataLoader(Augmented(3), 2, shuffle=True), None)
    took = [rank.step() for rank in ranks]
    assert [[micro.weight for micro, _ in part or []] for part in took] == [[4 / 3]] * 3 + [[0]]
    ((micro, batch),) = took[3] or []
    assert (micro.samples, micro.is_padding, batch.shape[0]) == (0, True, 1)


def test_collation_is_seeded_by_place() -> None:
    """The same samples in the same micro-batch are collated alike, on whichever rank and in whichever step."""

    def make(r: int, w: int) -> DataLoader[Any]:
        return DataLoader(Augmented(), 2, shuffle=True, collate_fn=masking)

    alone = one_rank(make)
    ranks = job(2, make, None, global_batch=8)
    both = [row for _ in range(SAMPLES // 8) for row in step_of(ranks) or []]
    assert both == alone[0][: len(both)]


@pytest.mark.parametrize(
    ("before", "after", "options", "warned", "said"),
    [
        (4, 2, {}, "8 → 4 samples now, since 4 → 2 ranks.*learning rate is yours.*global_batch=8", None),
        (4, 2, {"global_batch": 8}, None, None),
        (4, 2, {"global_batch": 6}, None, "8 → 6 samples from step 2 on"),
        (2, 2, {"global_batch": 6}, None, "4 → 6 samples from step 2 on"),
        (2, 2, {}, None, None),
    ],
)
def test_a_step_of_another_size_is_told(
    before: int, after: int, options: dict[str, Any], warned: str | None, said: str | None
) -> None:
    def make(r: int, w: int) -> DataLoader[Any]:
        return DataLoader(Augmented(), 2, shuffle=True)

    for steps, where in ((2, "in the middle"), (100, "at an epoch's end")):
        ranks = job(before, make, None)
        for _ in range(steps):
            if step_of(ranks) is None:
                break
        said_now = said and (
            said if where == "in the middle" else said.replace("step 2", f"step {ranks[0].place.step}")
        )
        states = [rank.place.state() for rank in ranks]
        for rank in job(after, make, states, **options):
            for found, expected in ((rank.warnings, warned), (rank.said, said_now)):
                assert len(found) == (expected is not None), (where, found)
                assert expected is None or re.search(expected, found[0])


def test_batch_size_is_free_where_the_global_batch_is_chosen() -> None:
    def sized(size: int, **options: Any) -> MakeLoader:
        return lambda r, w: DataLoader(Augmented(), size, **(options or {"shuffle": True}))

    whole = one_rank(sized(2))[0]
    first = job(2, sized(2), None, global_batch=6)
    took = [*(step_of(first) or []), *(step_of(first) or [])]
    states = [rank.place.state() for rank in first]
    for size in (1, 5):
        again = job(2, sized(size), states, global_batch=6)
        assert took + [row for _ in range(2) for row in step_of(again) or []] == whole
        assert not again[0].warnings + again[0].said
    with pytest.raises(UsageError, match=r"batch_size 2 → 5.*global_batch=….*no sample is skipped"):
        job(2, sized(5), states)
    loose = job(2, sized(1), states, strict=False)
    assert took + [row for _ in range(6) for row in step_of(loose) or []] == whole
    assert "its next sample comes next" in loose[0].warnings[0]
    # A sampler that is seeded anew for each batch gives another order for batches of another size.
    lazy = job(2, sized(2, sampler=LazySampler()), None, global_batch=6)
    step_of(lazy)
    with pytest.raises(UsageError, match="batch_size 2 → 5"):
        job(1, sized(5, sampler=LazySampler()), [rank.place.state() for rank in lazy], global_batch=6)


def test_a_checkpoint_that_counted_no_samples_goes_on() -> None:
    make = LOADERS["shuffled"]
    whole = one_rank(make)[0]
    (alone,) = job(1, make, None)
    for _ in range(3):
        alone.step()
    state = alone.place.state()
    del (
        state["world_size"],
        state["step_samples"],
        state["position"]["samples"],
        state["batches"]["own"],
        state["batches"]["over"],
    )
    for ranks in (job(1, make, [state]), job(3, make, [state])):
        assert [row for step in iter(partial(step_of, ranks), None) for row in step] == whole[6:]


def instead(name: str, rank: int, world_size: int, *_: int) -> Any:
    """The loader of another rank."""
    return LOADERS[name](rank, world_size)


def test_a_distributed_sampler_must_be_for_this_rank_and_is_replaced_in_one_line() -> None:
    (rank,) = job(1, LOADERS["distributed"], None, epochs=2)
    while rank.step() is not None:
        pass
    rank.step()
    (line,) = rank.said
    assert "DistributedSampler is replaced" in line
    for wrong in ((0, 4), (1, 2)):
        with pytest.raises(UsageError, match=f"rank {wrong[0]} of {wrong[1]}, but this process is rank 0 of 2"):
            Rank(0, 2, partial(instead, "distributed", *wrong))
        with pytest.raises(UsageError, match="BatchSamplerShard was made for"):
            Rank(0, 2, partial(instead, "accelerate", *wrong))


def test_accelerate_s_split_batches_share_out_the_batch() -> None:
    ranks = job(2, lambda r, w: DataLoader(Augmented(), batch_sampler=shard(r, w, split_batches=True)), None)
    assert [len(part[0][1]) for rank in ranks if (part := rank.step())] == [2, 2]


class Repeated(Sampler[int]):
    """Shards by itself, in its own way."""

    def __init__(self, num_replicas: int, rank: int) -> None:
        self.num_replicas, self.rank = num_replicas, rank

    def __iter__(self) -> Iterator[int]:
        yield from np.random.permutation(np.repeat(np.arange(8), 2)).tolist()[self.rank :: self.num_replicas]

    def __len__(self) -> int:
        return 16 // self.num_replicas


OWN: dict[str, MakeLoader] = {
    "self-sharding": lambda r, w: DataLoader(Augmented(), 2, sampler=Repeated(w, r)),
    "stateful": lambda r, w: StatefulDataLoader(Augmented(), 2, sampler=distributed(r, w)),
    "stateful-stream": lambda r, w: StatefulDataLoader(StreamOfPlaces(), 2),
    "stream": lambda r, w: DataLoader(Stream(), 2),
    "list": lambda r, w: [torch.full((2, 1), float(10 * number + r)) for number in range(6)],
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("name", OWN)
def test_where_each_rank_reads_its_own(name: str) -> None:
    make = OWN[name]

    def rest(ranks: list[Rank]) -> list[list[Any]]:
        return [[[batch.tolist() for _, batch in took] for took in iter(rank.step, None)] for rank in ranks]

    whole = rest(job(2, make, None))
    ranks = job(2, make, None)
    for _ in range(3):
        for rank in ranks:
            rank.step()
    states = [rank.place.state() for rank in ranks]
    assert rest(job(2, make, states)) == [part[3:] for part in whole]
    if name in ("self-sharding", "stateful"):
        assert whole[0] != whole[1]
        noises = [{sample[1] for took in part for batch in took for sample in batch} for part in whole]
        assert not noises[0] & noises[1], "other samples have other augmentations"
    with pytest.raises(UsageError, match=r"2 → 3 ranks in the middle.*batch 3 of epoch 0.*Go on with 2.*strict=False"):
        job(3, make, states)
    (alone,) = job(1, make, states, strict=False)
    assert "strict=False: 2 → 1 ranks" in alone.warnings[-1] + alone.warnings[0]
    rest(ranks)
    later = job(3, make, [rank.place.state() for rank in ranks])
    assert all(rank.step() for rank in later)
    assert later[0].place.position.epoch == 1
    with pytest.raises(UsageError, match=r"global_batch=6 needs samples that can be counted"):
        job(2, make, None, global_batch=6)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_that_every_rank_reads_whole_is_told() -> None:
    (rank, _) = job(2, lambda r, w: StatefulDataLoader(Augmented(), 2, shuffle=True), None)
    assert "every rank reads all samples" in rank.warnings[0]


def test_global_batches_need_a_batch_size() -> None:
    for name, why in (
        ("one-by-one", "automatic batching is off"),
        ("bucket-batches", "BucketBatches makes its batches"),
    ):
        with pytest.raises(UsageError, match=why):
            job(2, LOADERS[name], None, global_batch=6)
    with pytest.raises(UsageError, match="at least one sample on each rank, and this job has 4"):
        job(4, LOADERS["shuffled"], None, global_batch=3)


def sized(size: int, rank: int, world_size: int) -> DataLoader[Any]:
    return DataLoader(Augmented(), size, shuffle=True)


def numbers() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_generators_go_on_in_the_same_world_and_are_seeded_by_rank_in_another() -> None:
    def make(r: int, w: int) -> DataLoader[Any]:
        return DataLoader(Augmented(), 2, shuffle=True)

    states = []
    expected = []
    for rank in range(3):
        one = Rank(rank, 3, make)
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        one.step()
        states.append(one.place.state())
        expected.append(numbers())
    found = []
    for rank in range(3):
        Rank(rank, 3, make, state=states[rank])
        found.append(numbers())
    assert found == expected

    def in_a_world_of(world_size: int, state: dict[str, Any]) -> list[list[float]]:
        drawn = []
        for rank in range(world_size):
            Rank(rank, world_size, make, state=state)
            drawn.append(numbers())
        return drawn

    two, five = in_a_world_of(2, states[0]), in_a_world_of(5, states[0])
    assert two == in_a_world_of(2, states[0]), "the same resume draws the same"
    drawn = [number for world in (two, five, expected) for rank in world for number in rank]
    assert len(set(drawn)) == len(drawn), "no two ranks share a stream, nor the same rank of two worlds"


def test_the_sum_over_ranks_and_micro_batches_is_the_gradient_of_the_global_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 5, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    weight = torch.randn(5, 1, generator=generator)

    def gradient(indices: torch.Tensor, factor: float) -> torch.Tensor:
        model = weight.clone().requires_grad_()
        loss = torch.nn.functional.mse_loss(x[indices] @ model, y[indices]) * factor
        (grad,) = torch.autograd.grad(loss, model)
        return grad

    for world_size in (1, 2, 3, 4, 7):
        for global_batch, most in ((10, 3), (10, 1), (7, 64)):
            ranks = job(
                world_size, partial(sized, most), None,
                global_batch=global_batch,
            )  # fmt: skip
            sizes = []
            while (took := [rank.step() for rank in ranks])[0] is not None:
                parts = [[(batch[:, 0].long(), micro) for micro, batch in part] for part in took if part is not None]
                summed = [sum(gradient(indices, micro.weight) for indices, micro in part) for part in parts]
                averaged = torch.stack(summed).mean(0)  # type: ignore[arg-type]
                whole = torch.cat([indices for part in parts for indices, micro in part if not micro.is_padding])
                sizes.append(len(whole))
                torch.testing.assert_close(averaged, gradient(whole, 1.0), rtol=1e-6, atol=1e-6)
            assert sizes == [global_batch] * (SAMPLES // global_batch) + [SAMPLES % global_batch]


def test_the_ranks_of_a_job_are_known_before_its_loop() -> None:
    (rank,) = job(1, LOADERS["sequential"], None)
    with pytest.raises(UsageError, match="before its first loop"):
        rank.place.joins(0, 2)
    for wrong in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match="a number from 0"):
            Rank(*wrong, LOADERS["sequential"])
