"""torchrun and `accelerate launch` themselves start a job again of which a rank was killed: it ends as if nobody had struck."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forking import Zygote
from jobs import Job
from launchers import command_of, started, workers_of
from waiting import eventually

HERE = Path(__file__).parent
pytestmark = pytest.mark.long
GIVE_UP_S = 120.0
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "accelerate": ("accelerate_victim.train", "accelerate_zygote.py", {"accumulation": 3, "whole": True}),
    "huggingface": (
        "hf_job.main", "hf_zygote.py", {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2},
    ),
    "lightning": (
        "pl_victim.train", "pl_zygote.py",
        {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2, "val_check_interval": 4, "ema": True},
    ),
}  # fmt: skip
"""What is trained, who forks it, and how."""
STRIKES = [(0, "stepping:3"), (1, "stepping:5")]
"""In the first incarnation rank 0 is killed at its third step, in the second rank 1 at its fifth."""


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("kind", KINDS)
def test_started_again(zygote_of: Callable[[str], Zygote], tmp_path: Path, kind: str, launcher: str) -> None:
    pytest.importorskip({"huggingface": "transformers"}.get(kind, kind))
    train, script, settings = KINDS[kind]
    zygote = zygote_of(script)
    reference = Job(zygote, tmp_path / "reference", **settings, save_every="epoch").finish()
    job, log = Job(zygote, tmp_path / "struck"), tmp_path / "log"
    place = job.folder / "place"
    request = {
        "train": {"url": str(job.url), "result": str(job.folder / "result"), **settings, "save_every": "2 steps"},
        "pauses": STRIKES,
    }
    command = command_of(launcher, [str(HERE / "launched.py"), train, json.dumps(request)], restarts=2)
    environ = {"VICTIM_PLACE": str(place)}
    with log.open("w") as output, started(command, job.folder, environ=environ, output=output) as process:
        for rank, _ in STRIKES:
            eventually(lambda: place.exists() or process.poll() is not None, log.read_text, give_up_s=GIVE_UP_S)
            eventually(lambda: job.durable_step() > 0 or process.poll() is not None, log.read_text)
            assert process.poll() is None, log.read_text()
            os.kill(workers_of(process)[rank], signal.SIGKILL)
            place.unlink()
        assert process.wait(GIVE_UP_S) == 0, log.read_text()
    assert job.outcome() == reference
    said = log.read_text()
    for attempt in range(2, 2 + len(STRIKES)):
        assert f"attempt {attempt} resumes at step" in said
    assert f"attempt {2 + len(STRIKES)} " not in said
