"""Whatever is tracked: a training that was interrupted ends in the same bits as one that was not."""

# What raises or warns here is a whole run, which takes more than one statement.
# ruff: noqa: PT012
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import run_parts as parts
import torch
from run_parts import Killed, Stores, Training, run_once
from torch import nn

import holdfast
from holdfast.checkpoint.read import open_checkpoint
from holdfast.train.restoring import load_checkpoint
from holdfast.train.tracked import Tracker

TRAININGS: dict[str, Callable[[], Training]] = {
    "plain": parts.plain,
    "fused": partial(parts.plain, fused=True),
    "foreach": partial(parts.plain, foreach=True),
    "tensor learning rate": partial(parts.plain, amsgrad=True),
    "gan": parts.gan,
    "gan, discriminator seldom": partial(parts.gan, 3, 1),
    "accumulation": parts.accumulating,
    "scaler": parts.scaled,
    "scaler off": partial(parts.scaled, False),
    "sam": parts.sharpness_aware,
    "ema": parts.averaged,
    "bf16 with fp32 state": parts.low_precision,
    "channels last": parts.channels_last,
    "compiled": parts.compiled,
    "generators and containers": parts.generators,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# torch's compiler imports deprecated parts of torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRAININGS)
def test_interrupted_equals_uninterrupted(name: str) -> None:
    make = TRAININGS[name]
    whole = run_once(make, Stores(), save_every="1 h")
    stores = Stores()
    resumed_at = []
    for kill_in_step in (1, 2, 6, 7, 9, 13):
        with pytest.raises(Killed):
            run_once(make, stores, kill_in_step=kill_in_step)
        resumed_at.append(stores.checkpoints()[-1].step if stores.checkpoints() else 0)
    assert run_once(make, stores) == whole
    assert resumed_at[-1] >= 9, f"checkpoints came too seldom: {resumed_at}"


def test_snapshots_equal_a_deep_copy_at_every_boundary() -> None:
    """Each checkpoint, loaded into other objects, is what the state was at that boundary."""
    stores = Stores()
    seen: dict[int, str] = {}
    parts.seeded()
    training = parts.plain()
    with holdfast.Run("./run", save_every="1 step", keep=None, open_store=stores) as run:
        run.track(**training.tracked)
        for x, y in run.batches(parts.data()):
            seen[run.step] = parts.digest([t.state_dict() for t in training.tracked.values()])
            training.step(run, x, y)
            run.save()

    compared = 0
    with ThreadPoolExecutor(2) as pool:
        for ref in stores.checkpoints():
            if ref.step in seen:
                parts.seeded(ref.step)
                other, tracker = parts.plain(), Tracker()
                tracker.add(other.tracked)
                load_checkpoint(open_checkpoint(stores.only(), ref, stores), tracker, pool, strict=True)
                assert parts.digest([t.state_dict() for t in other.tracked.values()]) == seen[ref.step]
                compared += 1
    assert compared >= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_steps_are_refused_in_plain_words() -> None:
    torch._dynamo.reset()
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with (
        pytest.raises(Exception, match=r"compile optimizer\.step without it"),
        holdfast.Run("./run", open_store=Stores()) as run,
    ):
        run.track(model=model, optimizer=optimizer)
        for _ in run.batches([1]):
            model(torch.ones(1, 2)).sum().backward()
            step()


def test_wrappers_do_not_matter_to_a_checkpoint() -> None:
    accelerate = pytest.importorskip("accelerate")

    def wrapped() -> Training:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerator = accelerate.Accelerator(cpu=True)
        training = parts.plain()
        model, optimizer, scheduler = accelerator.prepare(
            training.tracked["model"], training.tracked["optimizer"], training.tracked["scheduler"]
        )
        model = torch.compile(nn.DataParallel(model), backend="eager")

        def step(run: holdfast.Run, x: torch.Tensor, y: torch.Tensor) -> None:
            optimizer.zero_grad()
            accelerator.backward(parts.loss_of(model, x, y))
            optimizer.step()
            scheduler.step()

        return Training({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step)

    stores = Stores()
    with pytest.raises(Killed):
        run_once(parts.plain, stores, kill_in_step=3)
    with pytest.raises(Killed):
        run_once(wrapped, stores, kill_in_step=9)
    assert run_once(parts.plain, stores) == run_once(parts.plain, Stores())


def test_parts_of_a_module_may_be_compiled_or_parallel() -> None:
    class Outer(nn.Module):
        def __init__(self, wrap: Callable[[nn.Module], Any]) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)  # a user's own name, which is not a wrapper's
            self.inner = wrap(nn.Linear(2, 2))

    stores = Stores()
    first = Outer(lambda module: nn.DataParallel(torch.compile(module, backend="eager")))
    with holdfast.Run("./run", open_store=stores) as run:
        run.track(model=first)
        run.save().wait()
    second = Outer(lambda module: module)
    with holdfast.Run("./run", open_store=stores) as run:
        run.track(model=second)
        assert run.restore()
    assert torch.equal(first.inner.module._orig_mod.weight, second.inner.weight)
    assert torch.equal(first.module.weight, second.module.weight)


def test_metrics_go_on_counting() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def make() -> Training:
        training = parts.plain()
        metrics = torchmetrics.MetricCollection(
            [torchmetrics.MeanMetric(), torchmetrics.CatMetric()], compute_groups=False
        )
        training.tracked["metrics"] = metrics
        inner = training.step

        def step(run: holdfast.Run, x: torch.Tensor, y: torch.Tensor) -> None:
            inner(run, x, y)
            metrics(y.mean())

        training.step = step
        training.result = lambda: parts.digest(metrics.compute())  # type: ignore[method-assign]
        return training

    stores = Stores()
    with pytest.raises(Killed):
        run_once(make, stores, kill_in_step=5)
    assert run_once(make, stores) == run_once(make, Stores())
