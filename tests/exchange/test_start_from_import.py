"""A script that tracks the same name starts its loop from imported weights, and what it saves then is an ordinary run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exchanging import import_
from make_fixture import StoppedClock
from same_bits import plain
from torch.utils.data import DataLoader, TensorDataset

from holdfast.core.errors import TrackedStateMismatch
from holdfast.core.ids import seeded_tokens
from holdfast.store.local import LocalStore
from holdfast.train.run import Run


class _Script:
    """Two epochs over six samples; `steps` and `seen` are what the loop did."""

    def __init__(self, url: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.run = Run(url, clock=StoppedClock(), tokens=seeded_tokens(seed), save_every="1 step")
        self.run.track(model=self.model, optimizer=self.optimizer)
        self.steps: list[int] = []
        self.seen: list[float] = []

    def train(self, *, until: int | None = None) -> None:
        samples = TensorDataset(torch.arange(12.0).reshape(6, 2))
        loader = DataLoader(samples, batch_size=2, shuffle=True)
        with self.run:
            for (batch,) in self.run.batches(loader, epochs=2):
                self.steps.append(self.run.step)
                self.seen.extend(batch[:, 0].tolist())
                self.optimizer.zero_grad()
                self.model(batch).square().mean().backward()
                self.optimizer.step()
                if len(self.steps) == until:
                    raise _Killed


class _Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOLDFAST_RUN", "HOLDFAST_CONTROL", "HOLDFAST_FRESH", "HOLDFAST_PREVIOUS_STEP"):
        monkeypatch.delenv(name, raising=False)


def test_the_loop_starts_at_its_beginning_with_these_weights(tmp_path: Path) -> None:
    weights = {"weight": torch.tensor([[3.0, -1.0]]), "bias": torch.tensor([0.5])}
    torch.save(weights, tmp_path / "weights.pt")
    import_(tmp_path / "weights.pt", into=LocalStore(tmp_path / "run"), step=100)
    script = _Script(tmp_path / "run", seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert script.run.restore()
    assert torch.equal(torch.get_rng_state(), before)  # the generators stay as the script has set them
    assert plain(dict(script.model.state_dict())) == plain(weights)
    assert script.optimizer.state_dict()["state"] == {}
    assert (script.run.step, script.run.epoch, script.run.batch, script.run.finished) == (100, 0, 0, False)
    script.train()
    assert script.steps == [100, 101, 102, 103, 104, 105]
    assert sorted(script.seen[:6]) == [0, 2, 4, 6, 8, 10]
    # Interrupted, it ends in the same bits: from its first save on it is a run like any other.
    import_(tmp_path / "weights.pt", into=LocalStore(tmp_path / "killed"), step=100)
    first = _Script(tmp_path / "killed", seed=1)
    torch.manual_seed(5)
    with pytest.raises(_Killed):
        first.train(until=4)
    second = _Script(tmp_path / "killed", seed=2)
    second.train()
    assert second.steps[-1] == 105
    assert plain(dict(second.model.state_dict())) == plain(dict(script.model.state_dict()))


def test_what_the_script_does_not_track_or_has_in_another_shape_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(1, 3), "bias": torch.ones(1)}, "ema": {}}, tmp_path / "weights.pt")
    import_(tmp_path / "weights.pt", into=LocalStore(tmp_path / "run"))
    with pytest.raises(TrackedStateMismatch) as caught:
        _Script(tmp_path / "run", seed=1).run.restore()
    assert len(caught.value.differences) == 2  # `ema`, and the weight; not the optimizer
