"""Retention by a logged metric, through `Run`."""

from __future__ import annotations

import pytest
from run_parts import Stores

import holdfast
from holdfast.checkpoint.format import CheckpointRef

URL = "memory://kept"


@pytest.mark.parametrize(("mode", "expected"), [("min", [2, 4]), ("max", [3, 4])])
def test_the_best_checkpoint_stays(mode: str, expected: list[int]) -> None:
    """The figure logged after the loop over batches belongs to the checkpoint made at the end of that epoch."""
    stores = Stores()
    scores = [0.5, 0.25, 0.75, 0.3]
    seen: list[CheckpointRef] = []
    keep = holdfast.Keep(last=1, best="score", mode=mode)  # type: ignore[arg-type]
    with holdfast.Run(URL, save_every="epoch", keep=keep, open_store=stores) as run:
        run.track(state={"n": 0})
        for epoch in run.epochs(len(scores)):
            # A save that still waits would be replaced by the next one, which is right, and not what this is about.
            while epoch and stores.checkpoints()[-1:] == seen:
                pass
            seen = stores.checkpoints()[-1:]
            for _ in run.batches([0]):
                pass
            run.log(score=scores[epoch])
    kept = stores.checkpoints()
    assert (kept[0].step, kept[0].figure) == (expected[0], scores[expected[0] - 1])
    assert kept[-1].step == expected[-1]
