"""`transformers.Trainer` resumed by its own checkpoints, and by holdfast's callback: what is lost, repeated or different.

Each way is compared with its own uninterrupted training. Both save every 10 optimizer steps. The training: a GPT-2 made from a
configuration, dropout, gradient accumulation, logs averaged over 4 steps, a callback with a state; once with samples that are
always the same, once with random augmentation.

    python benchmarks/huggingface.py --json benchmarks/results/huggingface-2cpu-DATE.json
"""

# mypy: ignore-errors
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = (17, 33, 38)
"""The steps in which the process gets SIGKILL; two of three lie between saves."""
STEPS, EPOCH_STEPS, BATCH, ACCUMULATION, SAVE_STEPS, LENGTH = 60, 25, 4, 2, 10, 16
STREAM_STEPS, SAMPLE_S, REPEATS = 250, 0.002, 5
CLOCKED = ("runtime", "per_second")


# ---- the training


def train(how: str, folder: Path, data: str) -> None:
    import torch
    from torch.utils.data import Dataset, IterableDataset
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import get_last_checkpoint

    from holdfast.train.huggingface import Callback

    read = [0]

    def sample(index: int) -> dict:
        read[0] += 1
        ids = (torch.arange(LENGTH) * index) % 32 if data == "plain" else torch.randint(0, 32, (LENGTH,))
        return {"input_ids": ids, "labels": ids, "index": index}

    class Map(Dataset):
        def __len__(self) -> int:
            return EPOCH_STEPS * BATCH * ACCUMULATION

        def __getitem__(self, index: int) -> dict:
            return sample(index)

    class Stream(IterableDataset):
        """Slow to read, and able to go on where it was."""

        next = 0

        def __iter__(self):
            while True:
                time.sleep(SAMPLE_S)
                self.next += 1
                yield sample(self.next - 1)

        def state_dict(self) -> dict:
            return {"next": self.next}

        def load_state_dict(self, state: dict) -> None:
            self.next = state["next"]

    class Model(GPT2LMHeadModel):
        used: list = []  # noqa: RUF012 - one model in a process

        def forward(self, input_ids=None, labels=None, index=None):
            self.used.extend(index.tolist())
            return super().forward(input_ids=input_ids, labels=labels)

    class Watch(TrainerCallback, ExportableState):
        """Says how far it is, and keeps a moving average."""

        def __init__(self) -> None:
            self.average = 0.0

        def state(self) -> dict:
            return {"args": {}, "attributes": {"average": self.average}}

        def on_step_end(self, args, state, control, model=None, **_) -> None:
            with open(folder / "steps", "a") as steps:
                print(json.dumps([state.global_step, model.used]), file=steps)
            model.used.clear()
            print(f"step {state.global_step} {read[0]}", flush=True)

        def on_log(self, args, state, control, logs=None, **_) -> None:
            self.average = 0.9 * self.average + 0.1 * logs.get("loss", 0.0)

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=32, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    is_stream = data == "stream"
    own = how != "holdfast"
    watch = Watch()
    trainer = Trainer(
        model=Model(config),
        args=TrainingArguments(
            str(folder / "output"), max_steps=10 * STREAM_STEPS if is_stream else STEPS, per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1 if is_stream else ACCUMULATION, logging_steps=4, report_to=[], disable_tqdm=True,
            use_cpu=True, seed=3, remove_unused_columns=False, dataloader_pin_memory=False,
            save_strategy="steps" if own else "no", save_steps=SAVE_STEPS, enable_jit_checkpoint=how == "jit",
        ),
        train_dataset=Stream() if is_stream else Map(),
        callbacks=[watch, *([] if own else [Callback(folder / "run", save_every=f"{SAVE_STEPS} steps")])],
    )  # fmt: skip
    print("ready", flush=True)
    last = get_last_checkpoint(str(folder / "output")) if own else None
    trainer.train(resume_from_checkpoint=last)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()
    history = [{k: v for k, v in entry.items() if not k.endswith(CLOCKED)} for entry in trainer.state.log_history]
    outcome = {"weights": weights, "history": history, "average": watch.average}
    (folder / "outcome").write_text(json.dumps(outcome))


# ---- what is done to it


class Attempt:
    def __init__(self, how: str, folder: Path, data: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--child", how, str(folder), data]
        environ = {**os.environ, "HOLDFAST_NOTICE": "none", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
        )

    def until(self, step: int) -> tuple[float, int]:
        """Seconds from "ready" to the first step, and samples read up to it. Returns when `step` is done, or at the end."""
        began_s, first = 0.0, (0.0, 0)
        for line in self.process.stdout:
            words = line.split()
            if words[:1] == ["ready"]:
                began_s = time.perf_counter()
            elif words[:1] == ["step"]:
                first = first if first[1] else (time.perf_counter() - began_s, int(words[2]))
                if int(words[1]) >= step:
                    break
        return first

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        for _ in self.process.stdout:
            pass
        return self.process.wait()


def outcome_of(folder: Path) -> dict:
    outcome = json.loads((folder / "outcome").read_text())
    steps = [json.loads(line) for line in (folder / "steps").read_text().splitlines()]
    # Of a step that was made twice, the last counts: it is in the weights.
    outcome["samples"] = [dict(map(tuple_of, steps))[step] for step in sorted({step for step, _ in steps})]
    outcome["again"] = len(steps) - len({step for step, _ in steps})
    return outcome


def tuple_of(line: list) -> tuple:
    return line[0], line[1]


def killed(how: str, folder: Path, data: str) -> dict:
    reference, victim = folder / "reference", folder / "killed"
    Attempt(how, reference, data).end()
    torn = 0
    for step in (*KILLS, None):
        while True:
            attempt = Attempt(how, victim, data)
            attempt.until(step or STEPS + 1)
            status = attempt.end(None if step is None else signal.SIGKILL)
            if status == (0 if step is None else -signal.SIGKILL):
                break
            # It does not start any more: what a person would do is take the half-written checkpoint away.
            shutil.rmtree(max((victim / "output").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
            torn += 1
    before, after = outcome_of(reference), outcome_of(victim)
    epoch = EPOCH_STEPS * BATCH * ACCUMULATION
    flat = [index for step in after["samples"] for index in step]
    return {
        "same weights": before["weights"] == after["weights"],
        "same order of samples": before["samples"] == after["samples"],
        "every sample once an epoch": all(
            len(set(flat[start : start + epoch])) == len(flat[start : start + epoch])
            for start in range(0, len(flat), epoch)
        ),
        "log entries that differ": sum(a != b for a, b in zip(before["history"], after["history"], strict=True)),
        "log entries": len(before["history"]),
        "callback's state": before["average"] == after["average"],
        "steps computed again": after["again"],
        "restarts that fail until a torn checkpoint is removed": torn,
    }


def terminated(how: str, folder: Path) -> dict:
    attempt = Attempt(how, folder, "augmented")
    attempt.until(KILLS[0])
    code = attempt.end(signal.SIGTERM)
    reached = json.loads((folder / "steps").read_text().splitlines()[-1])[0]
    attempt = Attempt(how, folder, "augmented")
    attempt.until(1)
    attempt.end(signal.SIGKILL)
    lines = [json.loads(line)[0] for line in (folder / "steps").read_text().splitlines()]
    resumed_at = lines[lines.index(reached) + 1] - 1
    return {"exit code": code, "steps lost": reached - resumed_at}


def streamed(how: str, folder: Path) -> dict:
    attempt = Attempt(how, folder, "stream")
    attempt.until(STREAM_STEPS + SAVE_STEPS // 2)
    attempt.end(signal.SIGKILL)
    found = []
    for _ in range(REPEATS):
        attempt = Attempt(how, folder, "stream")
        found.append(attempt.until(1))
        attempt.end(signal.SIGKILL)
    return {
        "first step after s": [round(seconds, 3) for seconds, _ in found],
        "samples read": [count for _, count in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3)
    args = parser.parse_args()
    if args.child:
        how, folder, data = args.child
        random.seed(3)
        train(how, Path(folder), data)
        return
    results: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        for how in ("trainer", "holdfast"):
            here = Path(scratch) / how
            results[how] = {
                "killed": killed(how, here / "plain", "plain"),
                "killed, augmented": killed(how, here / "augmented", "augmented"),
                "terminated": terminated(how, here / "terminated"),
                "streamed": streamed(how, here / "streamed"),
            }
            print(json.dumps({how: results[how]}, indent=2), flush=True)
        results["trainer, enable_jit_checkpoint"] = {"terminated": terminated("jit", Path(scratch) / "jit")}
        print(json.dumps(results["trainer, enable_jit_checkpoint"]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
