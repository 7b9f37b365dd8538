"""What is said about other hardware at a resume: in the manifest, and in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.retain import read_root
from holdfast.store.local import LocalStore
from holdfast.train.devices import Device, describe_devices, device_changes

V100 = Device("Tesla V100-SXM2-16GB", 16_945_512_448, (7, 0))
H100 = Device("NVIDIA H100 80GB HBM3", 85_017_755_648, (9, 0))


def changes(before: list[Device], now: list[Device], precision: str = "torch.float32") -> list[str]:
    metadata: dict[str, Any] = {"devices": describe_devices(before), "precision": ["torch.float32"]}
    return device_changes(metadata, describe_devices(now), [precision])


def test_what_is_different_is_said() -> None:
    assert changes([H100, H100], [H100, H100]) == []
    a_little_less = Device(H100.name, H100.memory_bytes - (64 << 20), H100.capability)
    assert changes([H100], [a_little_less]) == []
    smaller = changes([H100, H100], [V100])
    assert smaller[0] == (
        "changed since the checkpoint: devices: 2 x NVIDIA H100 80GB HBM3 (79.2 GiB) → 1 x Tesla V100-SXM2-16GB (15.8 GiB)"
    )
    assert "plan_batch" in smaller[1]
    assert len(changes([V100], [H100])) == 1, "more memory needs no plan"
    assert [line for line in changes([H100], [V100], "torch.bfloat16") if "no bfloat16 units" in line]
    assert [line for line in changes([H100], [H100], "torch.bfloat16") if "precision" in line]
    assert changes([H100, V100], [H100, V100]) == []
    assert device_changes({}, describe_devices([V100]), []) == [], "checkpoints of imports know nothing of it"


def test_it_is_in_the_manifest_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(epochs: int) -> None:
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with holdfast.Run(str(tmp_path / "run"), extend=True) as run:
            run.track(model=model, optimizer=optimizer)
            for x in run.batches([torch.ones(2, 4)] * 3, epochs=epochs):
                model(x).sum().backward()
                optimizer.step()

    train(1)
    store = LocalStore(tmp_path / "run")
    head = read_truth(store).head
    assert head is not None
    (device,) = read_root(store, head.checkpoints[-1]).metadata["devices"]
    assert device["count"] == 1
    assert device["memory_bytes"] > 1 << 20
    monkeypatch.setattr("holdfast.train.session.this_device", lambda: Device("another CPU", 1 << 30))
    capsys.readouterr()
    train(2)
    said = capsys.readouterr().err
    assert "changed since the checkpoint: devices: 1 x " in said
    assert "→ 1 x another CPU (1 GiB)" in said
    assert "run.plan_batch" in said
