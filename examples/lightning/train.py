"""Trains a small transformer with Lightning on the source of Python's standard library, and survives being killed.

The one line for holdfast is the callback. Start it, kill it, start it again with the same command:

    python train.py --url ./runs/letters

Nothing is downloaded. `--proof FILE` writes a hash of the weights, by which a run that was killed and one that was not can be
compared. `--devices 2` trains with two processes (DDP).
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from holdfast.train.lightning import Callback

MAX_CHARACTERS = 1_000_000


def read_text() -> torch.Tensor:
    """The standard library's modules, in the order of their names, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:MAX_CHARACTERS]), dtype=torch.uint8)


class Windows(Dataset[torch.Tensor]):
    """Stretches of the text, one after the other."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.text[index * self.context : (index + 1) * self.context + 1].long()


class Letters(pl.LightningModule):
    """Says which byte comes next."""

    def __init__(self, context: int, width: int, layers: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.letters, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, 256)

    def loss(self, window: torch.Tensor) -> torch.Tensor:
        seen, next_one = window[:, :-1], window[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(seen.shape[1], device=seen.device)
        x = self.letters(seen) + self.places(torch.arange(seen.shape[1], device=seen.device))
        return nn.functional.cross_entropy(
            self.out(self.layers(x, mask=mask, is_causal=True)).flatten(0, 1), next_one.flatten()
        )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=self.steps + 1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the number of threads decides in which order floats are summed
    pl.seed_everything(1)
    text = read_text()
    held_out = len(text) // 50
    model = Letters(args.context, args.width, args.layers, args.steps)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=50,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[Callback(args.url, save_every=args.save_every)],
    )
    trainer.fit(
        model,
        DataLoader(Windows(text[held_out:], args.context), batch_size=args.batch, shuffle=True),
        DataLoader(Windows(text[:held_out], args.context), batch_size=args.batch),
    )
    if args.proof and trainer.is_global_zero:
        sha = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            sha.update(name.encode() + tensor.cpu().numpy().tobytes())
        args.proof.write_text(sha.hexdigest() + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="where the run lives (default: $HOLDFAST_RUN, else ./runs/train)")
    parser.add_argument("--save-every", default="auto", help="default: %(default)s")
    parser.add_argument("--proof", type=Path, help="write a hash of the weights to this file")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--context", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
