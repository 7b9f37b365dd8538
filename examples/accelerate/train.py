"""Trains a small recurrent language model with `accelerate` on the source of Python's standard library, and survives being killed.

The lines for holdfast are the `with`, the `track` and the two loops. Start it, kill it, start it again with the same command:

    accelerate launch --multi_gpu --num_processes 2 train.py --url ./runs/chars

(without GPUs too: with `--cpu` it would start one process), or plainly `python train.py`. The model is made here: nothing is
downloaded. `--proof FILE` writes a hash of the weights, by which a run that was killed and one that was not can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

import holdfast

MAX_CHARACTERS = 500_000


class Windows(Dataset[torch.Tensor]):
    """Stretches of the standard library's modules, in the order of their names, as bytes."""

    def __init__(self, context: int) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self.text, self.context = torch.frombuffer(bytearray(text[:MAX_CHARACTERS]), dtype=torch.uint8), context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.text[index * self.context : (index + 1) * self.context + 1].long()


class Characters(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(256, width), nn.Dropout(0.1)
        self.recur, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, 256)

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.recur(self.drop(self.embed(before)))[0])
        return logits


class Smooth:
    """A moving average of the loss."""

    def __init__(self) -> None:
        self.loss = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.loss = state["loss"]


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the number of threads decides in which order floats are summed
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=args.accumulate)
    model = Characters(args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
    loader = DataLoader(Windows(args.context), batch_size=args.batch, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    smooth = Smooth()
    accelerator.register_for_checkpointing(smooth)
    with holdfast.Run(args.url, save_every=args.save_every) as run:
        run.track(accelerator=accelerator)
        for batch in run.batches(loader, epochs=args.epochs, batches_per_step=args.accumulate):
            with accelerator.accumulate(model):
                logits = model(batch[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            smooth.loss = 0.95 * smooth.loss + 0.05 * loss.item()
            run.log(loss=loss, smooth=smooth.loss)
            if run.micro.last and (run.step + 1) % 10 == 0:
                accelerator.print(f"step {run.step + 1}: loss {smooth.loss:.3f}", flush=True)
    if args.proof and accelerator.is_main_process:
        sha = hashlib.sha256()
        for name, tensor in accelerator.unwrap_model(model).state_dict().items():
            sha.update(name.encode() + tensor.cpu().numpy().tobytes())
        args.proof.write_text(sha.hexdigest() + "\n")
    accelerator.end_training()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="where the run lives (default: $HOLDFAST_RUN, else ./runs/train)")
    parser.add_argument("--save-every", default="auto", help="default: %(default)s")
    parser.add_argument("--proof", type=Path, help="write a hash of the weights to this file")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--accumulate", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--context", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
