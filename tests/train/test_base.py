"""`Run(url, base=…)`: fine-tuning many times on one frozen model, on real folders and in real processes."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_parts import Killed, digest, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.runs.verify import verify
from holdfast.core.errors import HoldfastWarning, RestoreError, UsageError
from holdfast.store.open import open_store
from holdfast.train.base import Base, choose_base

WIDTH = 128


class Adapted(nn.Module):
    """A frozen layer and a low-rank update that trains, as LoRA does."""

    def __init__(self, rank: int, frozen: dict[str, Tensor]) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.load_state_dict(frozen)
        self.frozen.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + self.up(self.down(x))
        return out


def batches(count: int = 6) -> DataLoader[Any]:
    x = torch.randn(4 * count, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.flip(1)), batch_size=4, shuffle=True)


def train(url: Path, model: nn.Module, *, steps: int = 6, stop_at: int | None = None, **options: Any) -> str:
    """One attempt; with `stop_at`, one that dies in the middle of that step, after the save of the one before is durable."""
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-2)
    with holdfast.Run(url, save_every="1 step", **options) as run:
        run.track(model=model, optimizer=optimizer)
        for x, y in run.batches(batches(steps), epochs=1):
            if run.step == stop_at:
                raise Killed
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return digest([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])


Frozen = dict[str, Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def frozen(base: Path) -> Frozen:
    """The weights that the base has ended with, as a script that loads them by its own means has them."""
    seeded(1)
    model = nn.Linear(WIDTH, WIDTH)
    train(base, model, keep=None)
    return {name: value.clone() for name, value in model.state_dict().items()}


def trial(url: Path, frozen: Frozen, seed: int = 7, **options: Any) -> str:
    seeded(seed)
    return train(url, Adapted(2, frozen), **options)


def head_of(folder: Path) -> Any:
    return read_truth(open_store(str(folder))).head


def data_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "data").rglob("*") if path.is_file())


def pins(folder: Path) -> list[Path]:
    return list((folder / "pins").glob("*.json"))


def test_a_trial_sends_no_more_than_what_trains_and_ends_bit_identical(
    tmp_path: Path, base: Path, frozen: Frozen, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = trial(tmp_path / "alone", frozen)
    with pytest.raises(Killed):
        trial(tmp_path / "trial", frozen, stop_at=1, base=base)
    assert "what is the same as in step 6 of this base is referred to and not sent" in capsys.readouterr().err
    frozen_bytes = sum(value.nbytes for value in frozen.values())
    total_bytes = head_of(tmp_path / "trial").checkpoints[0].total_bytes
    assert 0 < data_bytes(tmp_path / "trial") <= total_bytes - frozen_bytes < 0.2 * total_bytes
    with pytest.raises(Killed):
        trial(tmp_path / "trial", frozen, seed=8, stop_at=4, base=base)
    # The frozen tensors come out of the base when the trial is restored, whatever the script has made of them.
    nothing = {name: torch.zeros_like(value) for name, value in frozen.items()}
    assert trial(tmp_path / "trial", nothing, seed=9, base=base) == alone
    assert len(pins(base)) == 1
    assert verify(open_store(str(tmp_path / "trial")), open_home=open_store).good


def test_what_the_base_has_lost_is_never_loaded(tmp_path: Path, base: Path, frozen: Frozen) -> None:
    trial(tmp_path / "trial", frozen, base=base)
    shutil.rmtree(base)
    with (
        pytest.warns(HoldfastWarning, match="does not verify"),
        pytest.raises(RestoreError, match=r"none of the \d retained checkpoints verifies"),
    ):
        trial(tmp_path / "trial", frozen, extend=True, base=base)


def test_a_base_that_is_not_there_stops_a_new_run_and_warns_one_that_goes_on(
    tmp_path: Path, base: Path, frozen: Frozen
) -> None:
    typo = tmp_path / "bass"
    with pytest.raises(UsageError, match=r"bass: .*no run here.*leave base= out"):
        trial(tmp_path / "trial", frozen, base=typo)
    assert not typo.exists()
    with pytest.raises(UsageError, match=r"there are checkpoints of step .*6"):
        trial(tmp_path / "trial", frozen, base=f"{base}@9")
    with pytest.raises(Killed):
        trial(tmp_path / "trial", frozen, stop_at=2)
    with pytest.warns(HoldfastWarning, match=r"goes on from this run's own checkpoint: .*no run here"):
        trial(tmp_path / "trial", frozen, base=typo)
    assert head_of(tmp_path / "trial").finished
    assert pins(base) == []


def test_a_base_with_nothing_in_common_is_said_aloud(
    tmp_path: Path, base: Path, frozen: Frozen, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {name: value + 1 for name, value in frozen.items()}
    trial(tmp_path / "trial", other, base=f"{base}@6")
    assert capsys.readouterr().err.count("the first save had nothing in common with step 6 of the base") == 1
    assert head_of(tmp_path / "trial").pins == []
    train(base, nn.Linear(WIDTH, WIDTH), extend=True, keep=1, steps=7)
    assert pins(base) == []


def test_what_a_base_is_called() -> None:
    assert choose_base("s3://bucket/runs/gpt@1200", "s3://bucket/t") == Base("s3://bucket/runs/gpt", "1200")
    assert choose_base("gs://other/runs/gpt", "s3://bucket/t") == Base("gs://other/runs/gpt", "latest")
    assert choose_base("/runs/gpt@2", "file:///t") == Base("file:///runs/gpt", "2")
    assert choose_base("/runs/me@home", "file:///t") == Base("file:///runs/me%40home", "latest")
    assert choose_base("/runs/gpt@2/", "file:///t") == Base("file:///runs/gpt%402", "latest")
    for text, url in (
        ("/t", "file:///t"),
        ("/t/@3", "file:///t"),
        ("/base", "s3://bucket/t"),
        ("s3://bucket/b", "file:///t"),
    ):
        with pytest.raises(UsageError, match="base"):
            choose_base(text, url)
    with pytest.raises(UsageError, match="kind of store"):
        holdfast.Run("/t", base="ftp://base")


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, test_base
from pathlib import Path
torch.set_num_threads(1)
folder, number = Path(sys.argv[2]), int(sys.argv[3])
frozen = torch.load(folder / "frozen.pt")
print("ready", flush=True)
sys.stdin.readline()
print(test_base.trial(folder / f"trial-{number}", frozen, seed=number, base=folder / "base"))
"""


def test_trials_in_many_processes_share_one_base_that_trains_on(tmp_path: Path, base: Path, frozen: Frozen) -> None:
    torch.save(frozen, tmp_path / "frozen.pt")
    here = str(Path(__file__).parent)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, here, str(tmp_path), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        # Meanwhile the base goes on, and retains nothing of the frozen weights in the end.
        seeded(2)
        train(base, nn.Linear(WIDTH, WIDTH), extend=True, keep=1, steps=12)
        results = [child.communicate(timeout=120)[0].strip() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()
    for number, result in enumerate(results):
        folder = tmp_path / f"trial-{number}"
        assert verify(open_store(str(folder)), open_home=open_store).good
        assert result == trial(tmp_path / f"alone-{number}", frozen, seed=number)
        there = {path.stem for path in pins(base)}
        assert all(pin.name in there for pin in head_of(folder).pins)
