"""What a run writes down: figures, metadata, warnings; and that none of it holds secrets or graph memory."""

# What raises or warns here is a whole run, which takes more than one statement.
# ruff: noqa: PT012
from __future__ import annotations

import gc
import math
import subprocess
import sys
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_parts import Killed, Stores, plain, run_once
from torch.utils.data import DataLoader, IterableDataset

import holdfast
from holdfast import HoldfastWarning, UsageError
from holdfast.checkpoint.retain import read_root
from holdfast.ledger.read import read_events, read_metrics
from holdfast.train.metadata import describe_command, differences, hidden


def test_figures_of_every_kind_arrive_in_order() -> None:
    stores = Stores()
    heard: list[tuple[int, dict[str, float]]] = []

    def listen(step: int, figures: Mapping[str, float]) -> None:
        heard.append((step, dict(figures)))

    values = {
        "python": 1.5, "int": 2, "true": True, "huge": 10**18, "nan": math.nan, "inf": -math.inf,
        "np32": np.float32(0.5), "np0d": np.array(3), "np1": np.array([[4.0]]), "npbool": np.bool_(True),
        "zero_d": torch.tensor(1.0), "one": torch.ones(1, 1), "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
        "grad": torch.ones((), requires_grad=True) * 2, "intensor": torch.tensor(7), "booltensor": torch.tensor(True),
    }  # fmt: skip
    with holdfast.Run("./run", loggers=[listen], open_store=stores) as run:
        run.track(state={})
        for _ in run.batches([1, 2, 3]):
            run.log(**values, step=run.step)
            run.log(again=run.step)
    assert [step for step, _ in heard] == [0, 0, 1, 1, 2, 2]
    assert [figures["step"] for _, figures in heard[::2]] == [0, 1, 2]
    assert math.isnan(heard[0][1].pop("nan"))
    expected = {
        name: (value.detach().float() if isinstance(value, torch.Tensor) else np.asarray(value)).item()
        for name, value in values.items()
    }
    del expected["nan"]
    assert heard[0][1] == {**expected, "step": 0}
    events = list(read_events(stores.only()))
    assert [row[:2] for row in read_metrics(events, "bf16")] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert math.isnan(read_metrics(events, "nan")[0][1])


@pytest.mark.parametrize(
    "value",
    ["0.5", None, [1.0], torch.ones(2), torch.ones(0), np.ones(3), 1j, torch.tensor(1j), 10**400, object()],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_figure_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"log\(loss=…\)"), holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={})
        run.log(loss=value)


def test_logged_tensors_hold_no_graph() -> None:
    big = torch.ones(1000, requires_grad=True)
    with holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={})
        loss = (big * 2).sum()
        gone = weakref.ref(loss)
        run.log(loss=loss)
        del loss
        gc.collect()
        assert gone() is None


# ---- metadata


def test_metadata_say_what_a_person_wants_to_know() -> None:
    stores = Stores()
    run_once(plain, stores, config={"width": 6, "hf_token": "hf_abcdefghijklmnop"}, seed=3)
    metadata = read_root(stores.only(), stores.checkpoints()[-1]).metadata
    assert (metadata["step"], metadata["epoch"], metadata["seed"], metadata["batch_size"]) == (14, 2, 3, 4)
    assert metadata["precision"] == ["torch.float32"]
    assert metadata["world_size"] == 1
    assert 0 < metadata["learning_rates"]["optimizer"][0] < 1e-2
    assert metadata["config"] == {"width": 6, "hf_token": "[hidden]"}
    environment = metadata["environment"]
    assert environment["versions"]["torch"] == str(torch.__version__)
    assert {"deterministic_algorithms", "cudnn_benchmark", "threads"} <= set(environment["determinism"])
    assert {"cpu_count", "hostname"} <= set(environment["hardware"])
    assert metadata["devices"][0]["memory_bytes"] > 0
    assert "git_commit" in environment


def test_secrets_stay_out() -> None:
    arguments = [
        "/home/me/train.py", "--lr", "0.1", "--api-key", "abc", "--hf_token=xyz", "password=pw", "--out", "s3://user:pw@bucket/x",
        "hf_AbCdEfGhIjKlMnOpQrStUv", "--wandb", "0123456789abcdef0123456789abcdef01234567",
        "--model=gpt2-medium", "--auth-token", "--fast",
    ]  # fmt: skip
    shown = describe_command(arguments)
    assert shown == (
        "train.py --lr 0.1 --api-key [hidden] --hf_token=[hidden] password=[hidden] --out s3://[hidden]@bucket/x [hidden] "
        "--wandb [hidden] --model=gpt2-medium --auth-token --fast"
    )
    assert hidden({"a": {"secret": "s", "n": 1}, "list": ["hf_AbCdEfGhIjKlMnOpQrStUv"], "tokens": 5}) == {
        "a": {"secret": "[hidden]", "n": 1}, "list": ["[hidden]"], "tokens": 5,
    }  # fmt: skip


def test_what_changed_is_shown_shortly(capfd: pytest.CaptureFixture[str]) -> None:
    stores = Stores()
    with pytest.raises(Killed):
        run_once(plain, stores, kill_in_step=3, config={"width": 6, "note": "x" * 500})
    capfd.readouterr()
    run_once(plain, stores, config={"width": 7, "note": "y" * 500})
    lines = [line for line in capfd.readouterr().err.splitlines() if "changed since" in line]
    assert lines[0] == "holdfast: changed since the checkpoint: config.width: 6 → 7"
    assert len(lines) == 2
    assert all(len(line) < 250 for line in lines)
    assert differences({"a": (1, 2), "hostname": "x"}, {"a": [1, 3], "hostname": "y", "b": None}) == ["a[1]: 2 → 3"]
    assert differences({"x": float("nan")}, {"x": float("nan")}) == []


def test_the_commit_of_the_script_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.train.metadata import describe_environment

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e", *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    script = tmp_path / "train.py"
    script.write_text("1")
    monkeypatch.setattr(sys, "argv", [str(script)])
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert describe_environment()["git_commit"] == git("rev-parse", "HEAD")
    script.write_text("2")
    assert describe_environment()["git_commit"] == git("rev-parse", "HEAD") + "+"


# ---- warnings


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(8))


def test_warnings_point_at_the_script_and_are_said_once() -> None:
    stores = Stores()

    def attempt(kill_in_step: int) -> None:
        with holdfast.Run("./run", save_every="1 step", open_store=stores) as run:
            run.track(state={})
            for _ in run.epochs(2):
                for _ in run.batches(DataLoader(Stream(), batch_size=2)):  # this very line
                    if run.step == kill_in_step:
                        raise Killed

    with pytest.raises(Killed):
        attempt(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attempt(-1)
    (warning,) = told
    assert warning.category is HoldfastWarning
    assert "reads and drops 2 batches" in str(warning.message)
    assert warning.filename == __file__
    assert "this very line" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


def test_remembered_texts_are_the_same_in_all_attempts() -> None:
    stores = Stores()
    for expected in ("first", "first"):
        with holdfast.Run("./run", open_store=stores) as run:
            run.track(state={})
            made = run.remember("mlflow", lambda: "first")
            assert made == expected
            assert run.remember("mlflow", lambda: "second") == "first"
            with pytest.raises(UsageError, match="not a plain name"):
                run.remember("a/b", lambda: "x")
