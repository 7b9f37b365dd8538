"""What cannot be exact with an Accelerator is said before the first step; what is tracked with it, and under which names."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

import accelerate

import holdfast
from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.accelerate import check_loader, refuse_strategy
from holdfast.train.accelerate.versions import check_version


@pytest.fixture
def accelerator() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = accelerate.Accelerator(cpu=True)
    yield made
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerator: Any) -> tuple[Any, ...]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    return tuple(accelerator.prepare(model, optimizer, scheduler, loader))


@pytest.mark.parametrize("version", ["2.0.0", "2.1.0.dev0", "0.34.2", "3"])
def test_another_major_version_is_refused(
    version: str, accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=f"made for accelerate 1.x; this is {version}"):
        check_version(version)
    model, optimizer, _, loader = prepared(accelerator)
    monkeypatch.setattr(sys.modules["accelerate"], "__version__", version)
    run = holdfast.Run(tmp_path / "run", progress=False, notice="none")
    for tracked in (accelerator, optimizer):
        with pytest.raises(UsageError, match="pip install 'accelerate>=1,<2'"):
            run.track(thing=tracked)
    run.track(model=model)
    with run, pytest.raises(UsageError, match="this is"):
        next(run.batches(loader))


def test_the_versions_that_are_tested_are_accepted() -> None:
    for version in ("1.0.1", "1.15.0", "1.99.0", accelerate.__version__):
        check_version(version)


@pytest.mark.parametrize(
    ("kind", "says"), [("DEEPSPEED", "DeepSpeed keeps"), ("MEGATRON_LM", "Megatron"), ("XLA", "XLA's"), ("FSDP", "fsdp_version: 2")]
)  # fmt: skip
def test_strategies_that_hold_the_state_themselves_are_refused(kind: str, says: str) -> None:
    state = SimpleNamespace(
        distributed_type=accelerate.DistributedType(kind), fsdp_plugin=SimpleNamespace(fsdp_version=1)
    )
    with pytest.raises(UsageError, match=says):
        refuse_strategy(state)


def test_a_loader_whose_rank_0_reads_for_all_is_refused(accelerator: Any) -> None:
    kind = accelerate.data_loader.DataLoaderDispatcher
    loader = kind(TensorDataset(torch.ones(8, 2)), batch_size=2)
    check_loader(loader)
    loader.state = SimpleNamespace(num_processes=2)
    with pytest.raises(UsageError, match="dispatch_batches=True over a map-style dataset"):
        check_loader(loader)


def test_the_accelerator_stands_for_what_it_holds(accelerator: Any, tmp_path: Path) -> None:
    model, optimizer, scheduler, loader = prepared(accelerator)
    second = accelerator.prepare(nn.Linear(1, 1))
    accelerator.register_for_checkpointing(scheduler, nn.Linear(3, 3))
    run = holdfast.Run(tmp_path / "run", progress=False, notice="none")
    run.track(accelerator=accelerator, model=model)
    with run:
        for (x,) in run.batches(loader):
            accelerator.backward(model(x).sum())
            optimizer.step()
        # The model has a name of its own, and a scheduler that is prepared and registered is one scheduler.
        assert run._tracker.names() == [
            "accelerator", "model", "accelerator_model_2", "accelerator_optimizer", "accelerator_scheduler",
            "accelerator_object_2",
        ]  # fmt: skip
        assert run._tracker.optimizers() == {"accelerator_optimizer": optimizer.optimizer}
    assert second is not None


def test_what_comes_too_late_is_told(accelerator: Any, tmp_path: Path) -> None:
    model, optimizer, _, loader = prepared(accelerator)
    with holdfast.Run(tmp_path / "run", progress=False, notice="none", save_every="1 step") as run:
        run.track(accelerator=accelerator)
        batches = run.batches(loader)
        for _ in range(2):
            (x,) = next(batches)
            accelerator.backward(model(x).sum())
            optimizer.step()
        accelerator.prepare(nn.Linear(1, 1))
        with pytest.warns(HoldfastWarning, match="a model .Linear. was prepared or registered after"):
            next(batches)
