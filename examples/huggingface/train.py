"""Trains a small GPT-2 with `transformers.Trainer` on the source of Python's standard library, and survives being killed.

The one line for holdfast is the callback. Start it, kill it, start it again with the same command:

    python train.py --url ./runs/gpt2

On several processes it is the same: `torchrun --nproc-per-node 2 train.py …`, or `accelerate launch`. With `--lora` the model is
frozen and an adapter is trained over it; the frozen part is left out of the checkpoints.

The model is made from a configuration: nothing is downloaded. `--proof FILE` writes a hash of the weights, by which a run that was
killed and one that was not can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from holdfast.train.huggingface import Callback

MAX_CHARACTERS = 1_000_000


def read_text() -> torch.Tensor:
    """The standard library's modules, in the order of their names, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:MAX_CHARACTERS]), dtype=torch.uint8)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Stretches of the text, one after the other."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return len(self.text) // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.text[index * self.context : (index + 1) * self.context].long()
        return {"input_ids": window, "labels": window, "attention_mask": torch.ones_like(window)}


def with_adapter(model: GPT2LMHeadModel) -> Any:
    """Needs `pip install peft`. A real one would be `from_pretrained`; this one is the same at every start because of the seed."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True))


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the number of threads decides in which order floats are summed
    torch.manual_seed(1)
    text = read_text()
    held_out = len(text) // 50
    config = GPT2Config(
        vocab_size=256, n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "output_dir": str(args.output), "max_steps": args.steps, "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "warmup_steps": 20, "lr_scheduler_type": "cosine",
        "logging_steps": 10, "eval_strategy": "steps", "eval_steps": 50, "save_strategy": "no", "report_to": [],
        "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(), "seed": 1,
        "ddp_find_unused_parameters": False,
    }  # fmt: skip
    model = GPT2LMHeadModel(config)
    trainer = Trainer(
        model=with_adapter(model) if args.lora else model,
        args=TrainingArguments(**arguments),
        train_dataset=Windows(text[held_out:], args.context),
        eval_dataset=Windows(text[:held_out], args.context),
        callbacks=[Callback(args.url, save_every=args.save_every, frozen="left out" if args.lora else "saved")],
    )
    trainer.train()
    if args.proof and trainer.is_world_process_zero():
        sha = hashlib.sha256()
        for name, tensor in trainer.model.state_dict().items():
            sha.update(name.encode() + tensor.cpu().numpy().tobytes())
        args.proof.write_text(sha.hexdigest() + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="where the run lives (default: $HOLDFAST_RUN, else ./runs/train)")
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="the Trainer's folder (default: %(default)s)"
    )
    parser.add_argument("--save-every", default="auto", help="default: %(default)s")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter over the frozen model")
    parser.add_argument("--proof", type=Path, help="write a hash of the weights to this file")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--context", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
