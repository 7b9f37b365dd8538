"""Whose is the URL? Fresh, finished, another experiment; and what happens when the checkpoint does not fit the script."""

# What raises or warns here is a whole run, which takes more than one statement.
# ruff: noqa: PT031
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_parts as parts
import torch
from run_parts import Killed, Stores, run_once
from torch import nn

import holdfast
from holdfast import DifferentRun, HoldfastWarning, TrackedStateMismatch, UnsupportedState, UsageError
from holdfast.core.contract import ENV_ATTEMPT, ENV_FRESH, ENV_PREVIOUS_STEP


def a_run(stores: Stores, **options: Any) -> holdfast.Run:
    return holdfast.Run(options.pop("url", "./run"), open_store=stores, **options)


def train(stores: Stores, objects: dict[str, Any], batches: int = 2, **options: Any) -> holdfast.Run:
    with a_run(stores, **options) as run:
        run.track(**objects)
        for _ in run.batches([1, 2, 3, 4, 5][:batches]):
            pass
    return run


# ---- whose URL


def test_the_default_url_never_resumes_another_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    stores = Stores()
    config = {"width": 3, "path": tmp_path, "dtype": torch.float32, "rate": float("nan")}
    train(stores, {"model": nn.Linear(2, 2)}, url=None, config=config)
    assert list(stores.by_url) == [f"file://{tmp_path}/runs/train"]
    attempts: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"model": nn.Linear(2, 3)}, {"config": config}),
        ({"model": nn.Linear(2, 2)}, {"config": {**config, "width": 4}}),
        ({"model": nn.Linear(2, 2), "more": {}}, {"config": config}),
    ]
    for objects, options in attempts:
        with pytest.raises(DifferentRun, match=r"URL of its own.*fresh=True"):
            train(stores, objects, url=None, **options)
    same = a_run(stores, url=None, config=dict(reversed(config.items())))
    same.track(model=torch.compile(nn.Linear(2, 2), backend="eager"))
    assert same.finished
    same.close()
    assert train(stores, {"model": nn.Linear(2, 3)}, url=None, fresh=True).step == 2


def test_config_holds_plain_values() -> None:
    with pytest.raises(UsageError, match=r"config\.model\[1\]: a value of type Linear is not plain"):
        a_run(Stores(), config={"model": [1, nn.Linear(1, 1)]})


def test_fresh_starts_over_once_and_not_on_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores()
    state = {"n": 0}
    train(stores, {"state": state})

    def started_at(**options: Any) -> int:
        run = a_run(stores, **options)
        run.track(state=state)
        step = run.step
        run.close()
        return step

    assert started_at() == 2
    monkeypatch.setenv(ENV_FRESH, "1")
    monkeypatch.setenv(ENV_ATTEMPT, "1")
    assert started_at() == 0
    train(stores, {"state": state}, batches=3)
    monkeypatch.setenv(ENV_ATTEMPT, "2")
    monkeypatch.setenv(ENV_PREVIOUS_STEP, "3")
    assert started_at() == 3
    assert started_at(fresh=True) == 3
    monkeypatch.delenv(ENV_FRESH)
    monkeypatch.delenv(ENV_PREVIOUS_STEP)
    assert started_at(fresh=True) == 0


def test_a_finished_run_says_so_and_is_only_read(capfd: pytest.CaptureFixture[str]) -> None:
    stores = Stores()
    whole = run_once(parts.plain, stores)
    before = stores.checkpoints()
    capfd.readouterr()
    assert run_once(parts.plain, stores) == whole
    assert stores.checkpoints() == before
    assert "this run is finished at step 14; nothing is trained. Go on with extend=True" in capfd.readouterr().err
    run = a_run(stores)
    run.track(**parts.plain().tracked)
    assert (run.finished, run.step, run.epoch, run.attempt) == (True, 14, 2, 0)
    with pytest.raises(UsageError, match="only read"):
        run.save()
    run.close()


def test_extending_equals_a_longer_run() -> None:
    whole = run_once(parts.plain, Stores(), epochs=4)
    stores = Stores()
    run_once(parts.plain, stores, epochs=2)
    with pytest.raises(Killed):
        run_once(parts.plain, stores, epochs=4, extend=True, kill_in_step=17)
    assert run_once(parts.plain, stores, epochs=4, extend=True) == whole


# ---- what can be tracked


def test_what_cannot_be_tracked_is_refused_at_once() -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"a": {"b": object()}}

        def load_state_dict(self, state: Any) -> None: ...

    model = nn.Linear(1, 1)
    read_only = torch.zeros(2).numpy()
    read_only.flags.writeable = False
    run = a_run(Stores())
    run.track(model=model)
    for objects, message in (
        ({"best": 0.5}, "wrap it in a dict"),
        ({"kind": nn.Linear}, "is a class"),
        ({"again": torch.compile(model, backend="eager")}, "already tracked as 'model'"),
        ({"model": {}}, "something else is already tracked"),
        ({"frozen": read_only}, "read-only"),
        ({"loader": parts.data()}, "run.batches"),
        ({"a b": {}}, "not a plain name"),
        ({"thing": object()}, "state_dict"),
    ):
        with pytest.raises(UsageError, match=message):
            run.track(**objects)
    run.track(odd=Odd())
    with pytest.raises(UnsupportedState, match="odd/a/b"):
        run.restore()
    run.close()


# ---- mismatches


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_one_error_lists_every_difference_and_nothing_is_loaded() -> None:
    stores = Stores()
    model = two_layers()
    optimizer = adam(model)
    objects = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "scaler": torch.amp.GradScaler("cpu"),
        "table": torch.zeros(3),
        "gone": {"n": 1},
    }
    train(stores, objects)
    other = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1, bias=False), nn.Linear(1, 1).double())
    other_optimizer = torch.optim.Adam(list(other.parameters())[:4], lr=0.5)
    here = {
        "model": other,
        "optimizer": other_optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(other_optimizer, 9),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "table": torch.ones(3, dtype=torch.int64),
        "new": {},
    }
    before = parts.digest([getattr(value, "state_dict", lambda value=value: value)() for value in here.values()])
    with pytest.raises(TrackedStateMismatch) as refused:
        train(stores, here)
    text = str(refused.value)
    for line in (
        "gone: is in the checkpoint, but the script no longer tracks it",
        "new: is tracked, but not in the checkpoint",
        "model.0.weight: f32[3, 2] in the checkpoint, f32[4, 2] here",
        "model.1.bias: is in the checkpoint, but the module does not have it",
        "model.2.weight: the module has it, but not the checkpoint",
        "table: f32[3] in the checkpoint, i64[3] here",
        "optimizer: parameter 0 model.0.weight has the shape [3, 2] in the checkpoint, [4, 2] here",
        "optimizer: parameter 3",
        "scheduler.T_max: is here, but not in the checkpoint",
        "scheduler.gamma: is in the checkpoint, but not here",
        "scaler.scale: is in the checkpoint, but not here",
        "strict=False to load what fits",
    ):
        assert line in text, f"{line}\nis missing in\n{text}"
    assert len(refused.value.differences) >= 11
    assert before == parts.digest(
        [getattr(value, "state_dict", lambda value=value: value)() for value in here.values()]
    )


@pytest.mark.filterwarnings("ignore:strict=False left this out:holdfast.HoldfastWarning")
def test_not_strict_loads_what_fits() -> None:
    stores = Stores()
    first = two_layers()
    first_optimizer = adam(first)
    train(stores, {"model": first, "optimizer": first_optimizer, "state": {"n": 5}})
    second = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    untouched = parts.digest(second[1].state_dict())
    optimizer = torch.optim.Adam(second.parameters(), lr=0.1)
    state = {"n": 0}
    run = a_run(stores, strict=False)
    run.track(model=second, optimizer=optimizer, state=state)
    assert run.restore()
    assert state == {"n": 5}
    assert parts.digest(second[0].state_dict()) == parts.digest(first[0].state_dict())
    assert parts.digest(second[1].state_dict()) == untouched
    kept = [parameter in optimizer.state for parameter in second.parameters()]
    assert kept == [True, True, False, False]
    assert optimizer.param_groups[0]["lr"] == 0.5
    run.close()


def test_parameters_that_changed_places_keep_their_moments() -> None:
    """Equal shapes in another order: torch would give each parameter the other's moments, silently."""
    stores = Stores()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = adam(model)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    train(stores, {"model": model, "optimizer": optimizer})
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    swapped = torch.optim.Adam(list(other.parameters())[::-1])
    train(stores, {"model": other, "optimizer": swapped}, extend=True)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert torch.equal(optimizer.state[mine]["exp_avg"], swapped.state[its]["exp_avg"])


def test_an_object_that_refuses_its_state_is_named() -> None:
    class Picky:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: Any) -> None:
            raise KeyError("version")

    stores = Stores()
    train(stores, {"picky": Picky()})
    run = a_run(stores)
    run.track(picky=Picky())
    with pytest.raises(TrackedStateMismatch, match=r"picky: .*Picky refuses the state in the checkpoint: 'version'"):
        run.restore()
    with pytest.raises(UsageError, match="restore\\(\\) failed"):
        next(run.epochs(1))


# ---- settings


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("rule", ["checkpoint", "script"])
def test_changed_hyperparameters_are_shown_and_follow_the_rule(
    rule: str, as_tensor: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    stores = Stores()

    def attempt(lr: float, weight_decay: float = 0.0, **options: Any) -> tuple[float, str]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=torch.tensor(lr) if as_tensor else lr, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        run = a_run(stores, extend=True, **options)
        run.track(model=model, optimizer=optimizer)
        run.restore()
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["betas"] = (0.5, 0.6)  # changed by the training, not by the script
        run.save().wait()
        run.close()
        return rate, capfd.readouterr().err

    attempt(0.5)
    assert "the script changed" not in attempt(0.5)[1]
    rate, said = attempt(0.25, hyperparameters=rule)
    assert rate == (0.25 if rule == "script" else 0.5)
    assert "the script changed optimizer[0].lr: 0.5 → 0.25" in said
    assert ("NOT applied" in said) == (rule == "checkpoint")
    assert said.count("the script changed") == 1
    again = attempt(0.25)[1]
    assert ("NOT applied" in again) == (rule == "checkpoint"), "as long as it is not applied it is shown"


def test_a_seed_that_comes_too_late_is_told() -> None:
    stores = Stores()
    train(stores, {"state": {}}, seed=3)
    with pytest.warns(HoldfastWarning, match="seed=4 is ignored") as told:
        run = a_run(stores, seed=4)
        run.track(state={})
        run.restore()
        run.close()
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hyperparameters": "both"}, "hyperparameters must be"),
        ({"max_unsaved": -1}, "max_unsaved"),
        ({"keep": 0}, "keep must be"),
        ({"save_every": "often"}, "cannot save every"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        a_run(Stores(), **options)


def test_processes_that_have_not_joined_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = a_run(Stores())
    with pytest.raises(UsageError, match="init_process_group"):
        run.restore()


SCRIPT = """
import sys
import holdfast, torch
model = torch.nn.Linear(2, int(sys.argv[1]))
with holdfast.Run() as run:
    run.track(model=model)
    for batch in run.batches([1, 2, 3]):
        pass
print("step", run.step)
"""


def test_a_script_from_the_shell(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)

    def launch(width: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "train.py", width], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    first, second = launch("2"), launch("3")
    assert first.stdout == "step 3\n", first.stderr
    assert (tmp_path / "runs/train/run.json").exists()
    assert len(first.stderr.splitlines()) == 2
    assert second.returncode == 1
    assert "DifferentRun" in second.stderr.splitlines()[-1]


def test_a_run_that_is_never_left_says_so(tmp_path: Path) -> None:
    """Without `with` nothing tells success from failure, so the last save is not made: that must not go unnoticed."""
    script = (
        "import holdfast\nrun = holdfast.Run('./run', save_every='1000 steps')\nrun.track(x=[0])\n"
        "for _ in run.batches([1, 2]): pass\n"
    )

    def said(text: str) -> str:
        done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stderr

    assert "without leaving the run" in said(script)
    assert "without leaving the run" not in said(script + "run.close()\n")
