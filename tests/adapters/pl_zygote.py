"""Forks trainings of pl_victim.py, alone or as one of several ranks (tests/support/forking.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.extend(str(folder) for folder in (HERE, HERE.parent / "kills", HERE.parent / "support"))

import pl_victim  # noqa: E402
from forking import serve  # noqa: E402


def train(url: str, result: str, pace_s: float = 0.0, notice: str = "none", **arguments: Any) -> None:
    """`notice`: every job is told of it, and this victim has no need of it."""
    if "RANK" in os.environ:
        arguments["callbacks"] = [pl_victim.Page(Path(f"{url}.step-{os.environ['RANK']}"), pace_s)]
        # By these Lightning knows that torchrun has started it.
        os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="test")
        os.environ["VICTIM_PLACE"] = str(Path(result).with_name("place"))
    pl_victim.train(url, result, **arguments)


if __name__ == "__main__":
    serve(train)
