"""A job that goes on with another number of ranks, again and again: every sample once in each epoch, whatever happened."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from forking import Zygote
from job import EPOCHS, SAMPLES
from jobs import Job

from holdfast.core.contract import EXIT_PREEMPTED

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
GLOBAL_BATCH = 18
STEPS = EPOCHS * SAMPLES // GLOBAL_BATCH


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_every_sample_once_over_changes_of_the_world(zygote: Zygote, kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    job = Job(zygote, tmp_path / "a", kind=kind, global_batch=GLOBAL_BATCH)
    sizes = [4, 2, 3, 1, 2, 4, 1, 3, 2, 4, 3] if LONG else [2, 3, 1, 2]
    for size in sizes[:-1]:
        before = job.durable_step()
        job.start(size, pace_s=0.02)
        job.until_step(before + rng.randrange(1, 1 + max(1, STEPS // len(sizes))), rank=rng.randrange(size))
        job.signal(rng.randrange(size), signal.SIGTERM)
        codes = job.wait()
        assert codes in ([EXIT_PREEMPTED] * size, [0] * size), job.said()
    outcome = job.finish(sizes[-1])
    assert {rank["steps"] for rank in outcome} == {STEPS}
    # Everybody left in good order, so no step was computed twice.
    seen = job.samples_seen()
    assert sorted(seen) == sorted((epoch, number) for epoch in range(EPOCHS) for number in range(SAMPLES))
