"""Forks trainings of accelerate_victim.py (tests/support/forking.py)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.extend(str(folder) for folder in (HERE, HERE.parent / "kills", HERE.parent / "support"))

import accelerate_victim  # noqa: E402
import torch._dynamo  # noqa: E402, F401 - this and the next two are imported on the way otherwise, in every process anew
import torchdata.stateful_dataloader  # noqa: E402, F401
from forking import serve  # noqa: E402

import holdfast.train.run  # noqa: E402, F401

if __name__ == "__main__":
    serve(accelerate_victim.train)
