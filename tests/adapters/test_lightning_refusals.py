"""What the callback does not do, it refuses in plain words, before the first step; and what it does to a Trainer, it undoes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import lightning.pytorch as pl
import pl_victim
from torch.utils.data import DataLoader

from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.lightning import Callback as Holdfast
from holdfast.train.lightning.refusals import refuse_trainer
from holdfast.train.lightning.versions import check_parts, check_version

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch", "ignore:::typing_extensions",
                                        "ignore:The `srun` command")  # fmt: skip


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch, same_settings: None) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")


def fit(folder: Path, data: Any = None, ckpt_path: str | None = None, **settings: Any) -> tuple[pl.Trainer, Any]:
    trainer = pl_victim.make_trainer(str(folder / "run"), str(folder / "output"), **{"max_steps": 2, **settings})
    model = pl_victim.make_model()
    trainer.fit(model, datamodule=data or pl_victim.Data(), ckpt_path=ckpt_path)
    return trainer, model


def warned(act: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if issubclass(warning.category, HoldfastWarning)]


@pytest.mark.parametrize("version", ["1.9.5", "2.0.9", "2.3.3", "3.0.0", "3.0.0.dev0"])
def test_versions_that_are_not_known(version: str) -> None:
    with pytest.raises(UsageError, match=r"is made for lightning.pytorch 2\.\d+ or newer, and older than 3; this is"):
        check_version(version)
    with pytest.raises(UsageError, match=r"pip install 'pytorch-lightning>=2"):
        check_version(version, "pytorch_lightning")


def test_versions_that_are_known() -> None:
    check_version(pl.__version__)
    check_version("2.99.0.dev0")


def test_a_trainer_with_other_insides(tmp_path: Path) -> None:
    """Told before the first step, and nothing has been claimed."""

    class Other(pl.Trainer):
        def _run_sanity_check(self) -> None:
            return None

    trainer = Other(accelerator="cpu", logger=False, enable_checkpointing=False)
    check_parts(trainer)
    trainer.fit_loop.on_advance_end = None  # type: ignore[assignment, method-assign]
    with pytest.raises(UsageError, match=r"trainer.fit_loop has no on_advance_end\(\)"):
        check_parts(trainer)


def test_it_is_one_of_lightning_s_callbacks(tmp_path: Path) -> None:
    assert isinstance(Holdfast(tmp_path / "run"), pl.Callback)
    assert isinstance(Holdfast(tmp_path / "run"), Holdfast)
    with pytest.raises(UsageError, match="save_every"):
        Holdfast(tmp_path / "run", save_every="now and then")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"callbacks": [pl.callbacks.StochasticWeightAveraging(1e-2)]}, "replaces the learning rate schedulers"),
    ({"callbacks": [pl.callbacks.BackboneFinetuning()]}, "new parameters in the middle"),
    ({"callbacks": [pl.callbacks.LearningRateFinder()]}, "trains to find a value"),
    ({"overfit_batches": 2}, "overfit_batches"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_does_not_go_together(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fit(tmp_path, **settings)
    assert not (tmp_path / "run").exists(), "nothing has been claimed"


class TakesBatchesItself(pl_victim.Net):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return None


def test_a_step_that_takes_its_batches_itself(tmp_path: Path) -> None:
    trainer = pl_victim.make_trainer(str(tmp_path / "run"), str(tmp_path / "output"), max_steps=2)
    with pytest.raises(UsageError, match="takes batches by itself"):
        trainer.fit(TakesBatchesItself(), datamodule=pl_victim.Data())


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("ddp_fork", "cannot leave with an exit code"), ("ddp_spawn", "cannot leave with an exit code"),
        (pl.strategies.DDPStrategy(ddp_comm_hook=print), "ddp_comm_hook=…"),
        (pl.strategies.DDPStrategy(model_averaging_period=4), "model_averaging_period=…"),
    ],
)  # fmt: skip
def test_kinds_of_ddp(strategy: Any, words: str) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    trainer.strategy._lightning_module = pl_victim.make_model()
    with pytest.raises(UsageError, match=words):
        refuse_trainer(trainer)


@pytest.mark.parametrize(
    ("name", "words"), [("FSDPStrategy", "not supported"), ("DeepSpeedStrategy", "not supported"), ("Odd", "not known")]
)
def test_strategies(name: str, words: str) -> None:
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy._lightning_module = pl_victim.make_model()
    trainer._accelerator_connector.strategy = type(name, (), {"_lightning_module": None, "lightning_module": None})()
    with pytest.raises(UsageError, match=f"{name} is {words}"):
        refuse_trainer(trainer)


class Several(pl_victim.Data):
    def train_dataloader(self) -> Any:
        return {"one": super().train_dataloader(), "other": super().train_dataloader()}


class OfItsOwn(pl_victim.Data):
    def train_dataloader(self) -> Any:
        return pl_victim.DATA["stateful-stream"]()


def test_loaders_that_do_not_go(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="several train dataloaders"):
        fit(tmp_path, Several())
    with pytest.raises(UsageError, match="StatefulStream has no length"):
        fit(tmp_path, pl_victim.Data("stateful-stream"))
    with pytest.raises(UsageError, match="a state of its own and is no DataLoader"):
        fit(tmp_path, OfItsOwn())


@pytest.mark.parametrize(
    ("data", "workers", "words"),
    [
        ("stream", 0, "Stream is a stream without state_dict"),
        ("stateful-stream", 1, "out of reach in its 1 workers"),
        ("stateful-stream", 0, None),
    ],
)
def test_a_stream_s_price_is_told_at_the_start(tmp_path: Path, data: str, workers: int, words: str | None) -> None:
    said = warned(lambda: fit(tmp_path, pl_victim.Data(data, workers), max_steps=1, limit_train_batches=3))
    told = [one for one in said if "reads and drops all batches of the epoch" in one]
    assert len(told) == (words is not None)
    assert all(str(words) in one for one in told)


def test_evaluations_by_the_clock(tmp_path: Path) -> None:
    """They come at other steps after a resume."""
    if not hasattr(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), "_val_check_time_interval"):
        pytest.skip("this Lightning counts batches only")
    settings = {"val_check_interval": timedelta(hours=1), "check_val_every_n_epoch": None}
    said = warned(lambda: fit(tmp_path, **settings))
    assert ["val_check_interval is a time" in one for one in said] == [True]


SLURM = {
    "JOB_ID": "7",
    "JOB_NAME": "train",
    "NTASKS": "1",
    "NTASKS_PER_NODE": "1",
    "PROCID": "0",
    "LOCALID": "0",
    "NODEID": "0",
}


@pytest.mark.parametrize("finder", ["OnExceptionCheckpoint", "Slurm"])
def test_a_checkpoint_that_lightning_finds_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finder: str
) -> None:
    """It is not what the run begins with, and that is said; a run that has a checkpoint of its own says nothing."""
    output = tmp_path / "output"
    plain = pl_victim.make_trainer(None, str(output), max_steps=1)
    plain.fit(pl_victim.make_model(), datamodule=pl_victim.Data())
    found = output / {"OnExceptionCheckpoint": "on_exception.ckpt", "Slurm": "hpc_ckpt_1.ckpt"}[finder]
    plain.save_checkpoint(found)
    settings: dict[str, Any] = {}
    if finder == "OnExceptionCheckpoint":
        settings = {"callbacks": [pl.callbacks.OnExceptionCheckpoint(str(output))], "enable_checkpointing": True}
    else:
        for name, value in SLURM.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
    said = warned(lambda: fit(tmp_path, **settings))
    assert [f"Lightning has found {found}, and it is not used" in one for one in said] == [True]
    assert warned(lambda: fit(tmp_path, **settings)) == []


class OfAGroup(pl_victim.Net):
    GROUP = object()

    def loss(self, batch: Any) -> Any:
        loss = super().loss(batch)
        self.log("grouped", loss, on_step=False, on_epoch=True, sync_dist_group=self.GROUP)
        return loss


def test_averages_over_a_group_of_the_script_s_own(tmp_path: Path) -> None:
    """No checkpoint can hold the group."""

    def train(steps: int) -> None:
        callback = Holdfast(tmp_path / "run", extend=True)
        trainer = pl_victim.make_trainer(None, str(tmp_path / "output"), max_steps=steps, callbacks=[callback])
        trainer.fit(OfAGroup(), datamodule=pl_victim.Data())

    train(3)
    assert ["the averages of grouped over this epoch begin anew" in one for one in warned(lambda: train(5))] == [True]


def test_a_checkpoint_of_lightning_s_own_begins_no_run(tmp_path: Path) -> None:
    plain = pl_victim.make_trainer(None, str(tmp_path / "output"), max_steps=2, checkpoints=True)
    plain.fit(pl_victim.make_model(), datamodule=pl_victim.Data())
    path = str(tmp_path / "output" / "last.ckpt")
    plain.save_checkpoint(path)
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        fit(tmp_path, ckpt_path=path)
    fit(tmp_path)
    # A run that has one goes on from it, whatever the script asks for.
    trainer, _ = fit(tmp_path, ckpt_path=path)
    assert trainer.global_step == 2


def test_one_callback_for_one_trainer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two holdfast callbacks"):
        fit(tmp_path, callbacks=[Holdfast(tmp_path / "other")])


def test_trying_out_leaves_no_run(tmp_path: Path) -> None:
    assert ["without a holdfast run" in words for words in warned(lambda: fit(tmp_path, fast_dev_run=True))] == [True]
    assert not (tmp_path / "run").exists()


def test_an_epoch_that_a_hook_ends(tmp_path: Path) -> None:
    """`on_train_batch_start` may say that the rest of an epoch is to be skipped."""

    class Short(pl_victim.Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 + self.current_epoch else None

    trainer, model = (
        pl_victim.make_trainer(str(tmp_path / "run"), str(tmp_path / "output"), save_every="1 step"),
        Short(),
    )
    trainer.fit(model, datamodule=pl_victim.Data())
    assert trainer.global_step == 3 + 4 + 5
    assert pl_victim.outcome_of(trainer, model)["epoch"] == 3


def test_an_extended_run_equals_a_longer_one(tmp_path: Path) -> None:
    """It goes on in the middle of the epoch in which it had stopped."""
    longer, expected = fit(tmp_path / "longer", max_steps=9, accumulate_grad_batches=2)
    fit(tmp_path, max_steps=4, accumulate_grad_batches=2)
    callback = Holdfast(tmp_path / "run", extend=True, save_every="2 steps")
    extended = pl_victim.make_trainer(
        None, str(tmp_path / "output"), max_steps=9, accumulate_grad_batches=2, callbacks=[callback]
    )
    model = pl_victim.make_model()
    extended.fit(model, datamodule=pl_victim.Data())
    outcome, wanted = pl_victim.outcome_of(extended, model), pl_victim.outcome_of(longer, expected)
    for part in ("samples", "model", "optimizers", "rng", "step", "epoch", "average"):
        assert outcome[part] == wanted[part], part


def test_what_it_does_to_a_trainer_is_undone(tmp_path: Path) -> None:
    trainer, model = fit(tmp_path)
    loop = trainer.fit_loop
    owners = [trainer, loop, loop.epoch_loop, loop.epoch_loop.val_loop, loop._data_source, trainer._logger_connector,
              trainer._checkpoint_connector, trainer._signal_connector]  # fmt: skip
    assert not [
        name for owner in owners for name, part in vars(owner).items() if callable(part) and "holdfast" in repr(part)
    ]
    assert isinstance(trainer.train_dataloader, DataLoader)
    assert trainer.validate(model, datamodule=pl_victim.Data(), verbose=False)[0]["val_loss"] > 0
    mine = next(callback for callback in trainer.callbacks if isinstance(callback, Holdfast))
    with pytest.raises(UsageError, match="neither before nor after"):
        _ = mine.run
