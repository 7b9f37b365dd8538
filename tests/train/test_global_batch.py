"""`run.batches(loader, global_batch=…)`: a step is all of its micro-batches; saving and leaving wait for the last of them."""

# What raises or warns here is a whole run, which takes more than one statement.
# ruff: noqa: PT012
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from run_parts import Killed, Stores, net, seeded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import holdfast
from holdfast import Preempted, UsageError

SAMPLES, WIDTH = 22, 6


class Noisy(Dataset[torch.Tensor]):
    """Random per sample; can raise a signal while a sample is fetched."""

    def __init__(self) -> None:
        self.fetched = 0
        self.signal_at = -1

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        self.fetched += 1
        if self.fetched == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        return torch.full((WIDTH,), index / SAMPLES) + torch.rand(WIDTH)


def attempt(
    stores: Stores, batch_size: int | list[int], *, kill_in: int = -1, data: Noisy | None = None, global_batch: int = 8,
    seen: list[int] | None = None, **options: Any,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """Trains two epochs; dies at micro-batch number `kill_in` of this attempt. Returns all parameters, and the steps."""
    seeded()
    model = net().eval()  # without dropout and batch statistics, how a step is cut up leaves no trace but rounding
    model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    micros = 0
    sizes = iter([batch_size] * 9 if isinstance(batch_size, int) else batch_size)
    with holdfast.Run("./run", save_every="1 step", open_store=stores, **options) as run:
        run.track(model=model, optimizer=optimizer)
        data = data or Noisy()
        for epoch in run.epochs(2):
            loader = DataLoader(data, next(sizes), shuffle=True)
            for batch in run.batches(loader, global_batch=global_batch):
                if micros == kill_in:
                    raise Killed
                micros += 1
                micro = run.micro
                assert micro.samples == len(batch) <= (loader.batch_size or 0)
                assert micro.batch_samples == (
                    global_batch if run.batch < SAMPLES // global_batch else SAMPLES % global_batch
                )
                if seen is not None:
                    seen.append(epoch * 100 + run.batch)
                with run.accumulating(model):
                    (model(batch.double()).square().mean() * micro.weight).backward()
                if micro.last:
                    optimizer.step()
                    optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), run.step


def same(one: tuple[torch.Tensor, int], other: tuple[torch.Tensor, int]) -> None:
    """How a step is cut up makes no difference but in the order of additions."""
    assert one[1] == other[1]
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-9)


def test_killed_at_every_micro_batch_whatever_the_batch_size() -> None:
    whole = attempt(Stores(), 8)
    assert whole[1] == 2 * 3
    same(attempt(Stores(), 3), whole)
    for batch_size in (3, 8):
        for kill_in in (0, 1, 2, 4):
            stores = Stores()
            for other in (batch_size, 2):
                with pytest.raises(Killed):
                    attempt(stores, other, kill_in=kill_in)
            same(attempt(stores, 5), whole)


@pytest.mark.parametrize("at", range(1, 12))
def test_a_signal_in_the_middle_of_a_step_leaves_at_its_end(at: int) -> None:
    stores, data, seen = Stores(), Noisy(), list[int]()
    data.signal_at = at
    with pytest.raises(Preempted):
        attempt(stores, 3, data=data, seen=seen)
    # Samples 1 to 3 and 9 to 11 are waited for between two steps, where the wait is given up; 4 to 8 in the middle of one.
    steps = 0 if at <= 3 else 1
    assert [checkpoint.step for checkpoint in stores.checkpoints()] == [1] * steps
    assert seen == [0, 0, 0] * steps
    same(attempt(stores, 3), attempt(Stores(), 3))


def test_another_global_batch_is_allowed_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    stores = Stores()
    with pytest.raises(Killed):
        attempt(stores, 4, kill_in=3)
    seeded()
    seen = []
    with holdfast.Run("./run", save_every="1 step", open_store=stores) as run:
        model = net().double()
        run.track(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
        for _ in run.batches(DataLoader(Noisy(), 4, shuffle=True), epochs=1, global_batch=6):
            seen.append((run.batch, run.micro.index, run.micro.samples))
    assert "a step takes 8 → 6 samples from step 1 on" in capsys.readouterr().err
    assert seen == [(1, 0, 3), (1, 1, 3), (2, 0, 3), (2, 1, 3), (3, 0, 2)]


def test_one_rank_without_a_global_batch_has_whole_batches() -> None:
    loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
    with holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={})
        micros = []
        for _ in run.batches(loader):
            micros.append((run.micro.index, run.micro.count, run.micro.last, run.micro.samples, run.micro.weight))
    assert micros == [(0, 1, True, 2, 1.0), (0, 1, True, 2, 1.0), (0, 1, True, 1, 1.0)]
    with holdfast.Run("./other", open_store=Stores()) as run:
        run.track(state={})
        for _ in run.batches([1, 2]):
            assert (run.micro.samples, run.micro.weight, run.micro.last) == (None, 1.0, True)
        with pytest.raises(UsageError, match="ask inside the loop"):
            _ = run.micro


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("8", "an integer, not '8'"),
        (True, "an integer"),
        (0, "at least one sample"),
        (2.0, "an integer"),
        (-1, "at least"),
    ],
)
def test_misuse_is_refused_in_plain_words(wrong: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words), holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={})
        for _ in run.batches(DataLoader(Noisy(), 2), global_batch=wrong):
            pass


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_gradients_are_exchanged_with_the_last_micro_batch_only(group: None) -> None:
    ddp, plain = DistributedDataParallel(torch.nn.Linear(WIDTH, 1)), torch.nn.Linear(WIDTH, 1)
    sharded: Any = fully_shard(torch.nn.Linear(WIDTH, 1), mesh=init_device_mesh("cpu", (1,)))
    exchanges = []
    with holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={})
        for batch in run.batches(DataLoader(Noisy(), 3), global_batch=8):
            with run.accumulating(ddp, sharded, plain):
                group_of = sharded._get_fsdp_state()._fsdp_param_group
                exchanges.append((run.micro.last, ddp.require_backward_grad_sync, group_of.reduce_grads))
                torch.stack([model(batch).mean() for model in (ddp, sharded, plain)]).sum().backward()
            assert group_of.reduce_grads
            assert ddp.require_backward_grad_sync
    assert exchanges == [(last, last, last) for last, _, _ in exchanges]
    assert len(exchanges) == 3 + 3 + 2


def test_a_plan_for_this_job(group: None) -> None:
    run = holdfast.Run("./run", open_store=Stores())
    assert run.plan_batch(global_batch=12, micro_batch=5).micro_batch == 4
    plan = run.plan_batch(global_batch=1 << 20, memory_bytes_per_sample=64 << 10)
    assert plan.micro_batch * plan.accumulation >= 1 << 20
    assert "of memory for samples" in plan.reasons[0]
    run.close()


def test_a_plan_before_the_group_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = holdfast.Run("./run", open_store=Stores())
    assert run.plan_batch(global_batch=12, micro_batch=9).world_size == 3
    run.close()
