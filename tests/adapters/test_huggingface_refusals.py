"""What the callback does not do, it refuses in plain words, before the first step; and what it does to a Trainer, it undoes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import hf_victim
from transformers import Trainer, TrainingArguments
from transformers import trainer as library

from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.huggingface import Callback
from holdfast.train.huggingface.versions import check_parts, check_version

pytestmark = pytest.mark.usefixtures("same_settings")


def trainer_in(folder: Path, **settings: Any) -> Trainer:
    return hf_victim.make_trainer(str(folder / "run"), str(folder / "output"), **{"max_steps": 2, **settings})


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0", "6.0.0.dev0", "5.0.0"])
def test_versions_that_are_not_known(version: str) -> None:
    with pytest.raises(UsageError, match=r"is made for transformers 5\.\d+ or newer, and older than 6; this is"):
        check_version(version)


def test_versions_that_are_known() -> None:
    check_version()
    check_version("5.99.0.dev0")


def test_a_trainer_with_other_insides(tmp_path: Path) -> None:
    """Told when the Trainer is made, and not at its first step."""

    class Other(Trainer):  # type: ignore[misc]
        def _finalize_training(self, trial: Any) -> Any:
            return None

    with pytest.raises(UsageError, match=r"_finalize_training\(\) does not take num_train_samples, start_time"):
        Other(model=hf_victim.make_model(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
              callbacks=[Callback(tmp_path / "run")])  # fmt: skip
    with pytest.raises(UsageError, match="it has no get_train_dataloader"):
        check_parts(object())


@pytest.mark.parametrize("name", ["ignore_data_skip", "auto_find_batch_size"])
def test_arguments_that_do_not_go_together(tmp_path: Path, name: str) -> None:
    trainer = trainer_in(tmp_path, **{name: True})
    with pytest.raises(UsageError, match=rf"TrainingArguments\({name}=True\) with holdfast"):
        trainer.train()
    assert not (tmp_path / "run").exists(), "nothing has been claimed"


def test_a_checkpoint_of_the_trainer_s_own_begins_no_run(tmp_path: Path) -> None:
    plain = hf_victim.make_trainer(None, str(tmp_path / "output"), max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    trainer_in(tmp_path).train()
    # A run that has one goes on from it, whatever the script asks for.
    assert trainer_in(tmp_path).train(resume_from_checkpoint=True).global_step == 2


def test_a_stream_s_accumulation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Stream without a length"):
        trainer_in(tmp_path, data="stream", gradient_accumulation_steps=2).train()
    with pytest.raises(UsageError, match="Stream without a length"):
        trainer_in(tmp_path, data="stateful-stream", gradient_accumulation_steps=2).train()


def test_a_stream_s_price_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.warns(HoldfastWarning, match="reads and drops all batches of the epoch"):
        trainer_in(tmp_path, data="stream").train()


def test_one_callback_for_one_trainer(tmp_path: Path) -> None:
    callback, other = Callback(tmp_path / "run"), Callback(tmp_path / "other")
    hf_victim.make_trainer(None, str(tmp_path / "output"), callbacks=[callback])
    with pytest.raises(UsageError, match="belongs to another Trainer already"):
        hf_victim.make_trainer(None, str(tmp_path / "output"), callbacks=[callback])
    with pytest.raises(UsageError, match="two holdfast callbacks"):
        trainer_in(tmp_path, callbacks=[other])


def test_a_callback_that_comes_too_late(tmp_path: Path) -> None:
    trainer = hf_victim.make_trainer(None, str(tmp_path / "output"), max_steps=2)
    trainer.add_callback(Callback(tmp_path / "run"))
    with pytest.raises(UsageError, match="pass it when the Trainer is made"):
        trainer.train()


def test_options_are_checked_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_every"):
        hf_victim.make_trainer(str(tmp_path / "run"), str(tmp_path / "output"), save_every="now and then")


def test_an_extended_run_equals_a_longer_one(tmp_path: Path) -> None:
    """It goes on in the middle of the epoch in which it had stopped."""
    same = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 3}
    longer = trainer_in(tmp_path / "longer", max_steps=7, **same)
    longer.train()
    trainer_in(tmp_path, max_steps=3, **same).train()
    callback = Callback(tmp_path / "run", extend=True, save_every="2 steps")
    extended = hf_victim.make_trainer(None, str(tmp_path / "output"), max_steps=7, callbacks=[callback], **same)
    extended.train()
    expected, outcome = hf_victim.outcome_of(longer), hf_victim.outcome_of(extended)
    for part in ("samples", "model", "optimizer", "rng", "step", "flos"):
        assert outcome[part] == expected[part], part


def test_a_step_of_another_size(tmp_path: Path) -> None:
    """The Trainer counts in steps: refused in the middle of an epoch, told at its end."""

    def train(**settings: Any) -> int:
        callback = Callback(tmp_path / "run", extend=True)
        trainer = hf_victim.make_trainer(None, str(tmp_path / "output"), callbacks=[callback], **settings)
        return int(trainer.train().global_step)

    assert train(max_steps=3) == 3
    with pytest.raises(UsageError, match="an optimizer step takes 4 → 2 samples in the middle of an epoch"):
        train(per_device_train_batch_size=2, max_steps=9)
    # Of the same size it may be made otherwise.
    assert train(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1) == 11
    with pytest.warns(HoldfastWarning, match="an optimizer step takes 4 → 2 samples from this epoch on"):
        assert train(per_device_train_batch_size=2, num_train_epochs=2) == 11 + 22


def test_what_it_does_to_a_trainer_is_undone(tmp_path: Path) -> None:
    skip = library.skip_first_batches
    trainer = trainer_in(tmp_path, eval_on_start=True)
    mine = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Callback))
    before = set(vars(trainer))
    trainer.train()
    assert not [name for name in set(vars(trainer)) - before if callable(getattr(trainer, name))]
    assert trainer.args.eval_on_start
    assert library.skip_first_batches is skip
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(UsageError, match="neither before nor after"):
        _ = mine.run
