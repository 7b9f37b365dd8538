"""LoRA over a frozen base, with `transformers.Trainer`: exact after every kill, and the base is sent once, or never."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import hf_victim
import torch
from adapter_grounds import ground_for, killed_often, stopped_at, struck_often
from forking import Zygote
from jobs import Job
from transformers import TrainerCallback

from holdfast.core.errors import UsageError
from holdfast.train.huggingface import Callback

ZYGOTE = "hf_zygote.py"
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks for it
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 25 if LONG else 2
WIDE = 384
LORA: dict[str, Any] = {"adapter": "lora", "eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 2}
HEAD: dict[str, Any] = {**LORA, "adapter": "head", "gradient_accumulation_steps": 2, "frozen": "left out"}
BEST: dict[str, Any] = {
    **HEAD, "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True, "save_total_limit": 1,
    "metric_for_best_model": "loss", "greater_is_better": False,
}  # fmt: skip


def stored_bytes(url: Path) -> int:
    return sum(path.stat().st_size for path in url.rglob("*") if path.is_file())


class Sizes(TrainerCallback):
    """What the run's folder holds after each save."""

    def __init__(self, callback: Callback, url: Path) -> None:
        self.callback, self.url = callback, url
        self.bytes: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 4 == 2:
            self.save = self.callback.run.save()
        if state.global_step % 4 == 0:
            self.save.wait()
            self.bytes.append(stored_bytes(self.url))


@pytest.mark.parametrize("settings", [LORA, HEAD], ids=["lora", "head"])
def test_random_kills(zygote: Zygote, tmp_path: Path, settings: dict[str, Any]) -> None:
    reference = ground_for(zygote, tmp_path / "reference", settings).finish()
    for outcome in killed_often(zygote, tmp_path / "killed", settings, KILLS, settings["adapter"]):
        assert outcome == reference


def test_the_best_adapter_survives_the_machine(zygote: Zygote, tmp_path: Path) -> None:
    reference = ground_for(zygote, tmp_path / "reference", BEST).finish()
    assert reference["best"][1] < reference["step"]
    ground = ground_for(zygote, tmp_path / "killed", BEST, save_every="1 step")
    stopped_at(ground, f"stepping:{reference['step']}", signal.SIGKILL)
    shutil.rmtree(ground.folder / "output")
    assert ground.finish() == reference


@pytest.mark.long
@pytest.mark.parametrize("frozen", ["saved", "left out"])
def test_on_two_ranks(zygote: Zygote, tmp_path: Path, frozen: str) -> None:
    settings = {**HEAD, "frozen": frozen}
    reference = Job(zygote, tmp_path / "reference", **settings).finish()
    for outcome in struck_often(zygote, tmp_path / "killed", settings, 4, frozen):
        assert outcome == reference


@pytest.mark.usefixtures("same_settings")
@pytest.mark.parametrize("frozen", ["saved", "left out"])
def test_what_is_sent(tmp_path: Path, frozen: Any) -> None:
    """The base with the first save, or not at all; then the adapter, its optimizer, and what a run keeps of itself."""
    url = tmp_path / "run"
    callback = Callback(url, save_every="1 h", keep=None, frozen=frozen)
    sizes = Sizes(callback, url)
    trainer = hf_victim.make_trainer(
        None, str(tmp_path / "output"), adapter="lora", width=WIDE, max_steps=12, callbacks=[callback, sizes]
    )
    parameters = list(trainer.model.parameters())
    base, trained = (
        sum(p.numel() * p.element_size() for p in parameters if p.requires_grad == wanted) for wanted in (False, True)
    )
    assert base > 200 * trained
    trainer.train()
    first, *later = (after - before for before, after in pairwise([0, *sizes.bytes]))
    assert (first > base) == (frozen == "saved")
    for sent in later:
        assert 3 * trained < sent < 3 * trained + 150_000
    assert first < (base if frozen == "saved" else 0) + 3 * trained + 150_000


@pytest.mark.usefixtures("same_settings")
def test_another_run_s_base_is_referred_to(tmp_path: Path) -> None:
    """Of two adapters over one base, the second sends its own part only."""
    for name, options in (("one", {}), ("two", {"base": tmp_path / "one"})):
        callback = Callback(tmp_path / name, **options)
        hf_victim.make_trainer(
            None, str(tmp_path / "output"), adapter="lora", width=WIDE, max_steps=2, callbacks=[callback]
        ).train()
    assert stored_bytes(tmp_path / "one") > 10 * stored_bytes(tmp_path / "two")


@pytest.mark.usefixtures("same_settings")
def test_what_is_left_out_must_be_the_same(tmp_path: Path) -> None:
    def trainer(**options: Any) -> Any:
        settings = {"adapter": "lora", "frozen": "left out", "max_steps": 2}
        return hf_victim.make_trainer(str(tmp_path / "run"), str(tmp_path / "output"), **{**settings, **options})

    trainer().train()
    other = trainer(max_steps=4)
    with torch.no_grad():
        next(p for p in other.model.parameters() if not p.requires_grad)[0, 0] += 1
    with pytest.raises(UsageError, match="the frozen parameters are not those that this run was begun with"):
        other.train()
    with pytest.raises(UsageError, match="was frozen when the training began and is trained now"):
        hf_victim.make_trainer(None, str(tmp_path / "output"), adapter="lora", max_steps=4,
                               callbacks=[Callback(tmp_path / "thawed", frozen="left out"), Thaw()]).train()  # fmt: skip
    with pytest.raises(UsageError, match='it is "saved" or "left out"'):
        Callback(tmp_path / "run", frozen="gone")  # type: ignore[arg-type]


class Thaw(TrainerCallback):
    """Unfreezes everything in the middle of the training."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.requires_grad_(True)
