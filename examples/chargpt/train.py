"""Trains a character-level GPT on the source of Python's standard library: an ordinary PyTorch script, made to survive.

    standard library → text → windows → DataLoader → GPT → weights

The lines that name `run` are all that holdfast asks for. Start it, kill it, start it again with the same command:

    python train.py --url ./runs/chargpt

What a resumed run needs is tracked; the order of the samples, the position in the epoch and the random generators are kept
unasked. `--proof FILE` writes hashes of what came out, by which two runs can be compared bit by bit.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import GPT
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.utils.data import DataLoader, Dataset

import holdfast

Tokens = np.ndarray[Any, np.dtype[np.uint16]]
MAX_CHARACTERS = 4_000_000
MIN_CHARACTERS = 100_000
VALIDATION_WINDOWS = 64


def read_text() -> str:
    """The modules of the standard library in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py")))
    if len(text) < MIN_CHARACTERS:
        raise SystemExit(
            f"{folder} holds {len(text)} characters of source: this Python comes without its library's text"
        )
    return text[:MAX_CHARACTERS]


def encode(text: str) -> tuple[Tokens, int]:
    """Characters as numbers, and how many different ones there are. Numbers follow the order of code points."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    vocabulary = sorted(map(ord, set(text)))
    number_of = np.zeros(vocabulary[-1] + 1, dtype=np.uint16)
    number_of[vocabulary] = range(len(vocabulary))
    return number_of[codes], len(vocabulary)


class Windows(Dataset[tuple[int, Tensor, Tensor]]):
    """`count` windows, spread evenly over the text: (index, characters, the characters that follow them)."""

    def __init__(self, tokens: Tokens, count: int, context: int) -> None:
        self.tokens, self.count, self.context = tokens, count, context

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        start = index * (len(self.tokens) - self.context - 1) // self.count
        window = torch.from_numpy(self.tokens[start : start + self.context + 1].astype(np.int64))
        return index, window[:-1], window[1:]


def loss_of(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    torch.use_deterministic_algorithms(True)
    # Fixed, because the number of threads decides in which order floats are summed.
    torch.set_num_threads(args.threads)

    tokens, vocabulary = encode(read_text())
    train_tokens, validation_tokens = np.split(tokens, [len(tokens) * 9 // 10])
    windows = Windows(train_tokens, args.batch * args.batches, args.context)
    loader = DataLoader(windows, batch_size=args.batch, shuffle=True, num_workers=args.workers)
    held_out = Windows(validation_tokens, VALIDATION_WINDOWS, args.context)
    _, validation_x, validation_y = next(iter(DataLoader(held_out, batch_size=VALIDATION_WINDOWS)))

    model = GPT(vocabulary, args.context, args.width, args.layers, heads=4, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.epochs * len(loader))
    best = copy.deepcopy(model)
    record: dict[str, Any] = {"best": math.inf, "order": ""}

    with holdfast.Run(args.url, save_every=args.save_every, loggers=[show]) as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, best=best, record=record)
        for _epoch in run.epochs(args.epochs):
            model.train()
            for index, x, y in run.batches(loader):
                loss = loss_of(model, x, y)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                record["order"] = chained(record["order"], index)
                run.log(loss=loss)
            with run.evaluating(), torch.no_grad():
                validation_loss = loss_of(model.eval(), validation_x, validation_y).item()
            run.log(validation_loss=validation_loss)
            if validation_loss < record["best"]:
                record["best"] = validation_loss
                best.load_state_dict(model.state_dict())

    if args.proof:
        proof = {"weights": digest(model), "optimizer": digest(optimizer), "order": record["order"]}
        args.proof.write_text(json.dumps(proof, indent=2) + "\n")


def show(step: int, figures: Mapping[str, float]) -> None:
    print(f"step {step}", *(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)


def chained(before: str, index: Tensor) -> str:
    """The hash of all sample numbers so far, in their order: that of the last hash and the new numbers."""
    return hashlib.sha256(before.encode() + index.numpy().tobytes()).hexdigest()


def digest(stateful: torch.nn.Module | torch.optim.Optimizer) -> str:
    """SHA-256 over the whole state: every byte of every tensor, and every setting."""
    sha = hashlib.sha256()

    def walk(path: str, node: Any) -> None:
        if isinstance(node, Tensor):
            sha.update(f"{path} {node.dtype} {tuple(node.shape)}\n".encode() + node.numpy().tobytes())
        elif isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{path}.{key}", value)
        elif isinstance(node, list | tuple):
            for number, value in enumerate(node):
                walk(f"{path}.{number}", value)
        else:
            sha.update(f"{path} {node!r}\n".encode())

    walk("", stateful.state_dict())
    return sha.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="where the run lives (default: $HOLDFAST_RUN, else ./runs/train)")
    parser.add_argument("--save-every", default="20 steps", help="default: %(default)s")
    parser.add_argument("--proof", type=Path, help="write hashes of the outcome to this file")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=100, help="batches in an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows in a batch (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="characters in a window (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
