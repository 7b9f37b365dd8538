"""An unmodified Hugging Face Trainer script under `holdfast run --mirror`: killed, preempted, restored: the result is the same."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_mirror_run import Place

pytest.importorskip("transformers")
pytestmark = pytest.mark.long

STEPS = 40
SCRIPT = """
import hashlib, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

out, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=128, n_layer=4, n_head=2))
generator = torch.Generator().manual_seed(1)
data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (512, 64), generator=generator)]
arguments = TrainingArguments(
    output_dir=out, max_steps=steps, per_device_train_batch_size=16, save_steps=4, save_total_limit=2, logging_steps=1,
    report_to=[], disable_tqdm=True, use_cpu=True, seed=0, dataloader_num_workers=0,
)
last = get_last_checkpoint(out) if os.path.isdir(out) else None
print("started", os.getpid(), last.rsplit("-", 1)[1] if last else 0, flush=True)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train(resume_from_checkpoint=last)
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
print("result", digest, flush=True)
"""


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Place, Place]]:
    made = []
    for name in ("undisturbed", "preempted"):
        (tmp_path / name).mkdir()
        made.append(Place(tmp_path / name, SCRIPT, STEPS))
    yield made[0], made[1]
    for place in made:
        if place.agent is not None and place.agent.poll() is None:
            place.kill_the_machine()


def result_of(place: Place) -> str:
    place.start()
    digest = ""
    for words in place.lines():
        digest = words[1] if words[0] == "result" else digest
    assert place.wait() == 0, place.said.read_text()[-3000:]
    return digest


def steps_until(place: Place, count: int) -> bool:
    """False when the command ended first. The Trainer prints one line for each step."""
    for words in place.lines():
        count -= words[0] in ("{'loss':", "{'loss'")
        if count <= 0:
            return True
    return False


def test_a_trainer_that_is_killed_and_preempted_ends_with_the_same_weights(places: tuple[Place, Place]) -> None:
    undisturbed, preempted = places
    expected = result_of(undisturbed)
    rng = random.Random(5)
    for how in ("kill", "sigterm", "kill", "kill"):
        preempted.start()
        if not steps_until(preempted, rng.randrange(8, 16)):
            preempted.wait()
            break
        if how == "kill":
            preempted.kill_the_machine()
        else:
            assert preempted.agent is not None
            preempted.agent.send_signal(signal.SIGTERM)
            preempted.wait()
        preempted.fresh_machine()
    assert result_of(preempted) == expected
    assert any(preempted.started_at), f"it did resume: {preempted.started_at}"
