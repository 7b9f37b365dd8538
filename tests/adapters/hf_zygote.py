"""Forks trainings of hf_victim.py, alone or as one of several ranks (hf_job.py); see tests/support/forking.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.extend(str(folder) for folder in (HERE, *(HERE.parent / name for name in ("kills", "support", "ranks"))))

import hf_job  # noqa: E402
import hf_victim  # noqa: E402
from forking import serve  # noqa: E402


def train(**arguments: Any) -> None:
    (hf_job.main if "RANK" in os.environ else hf_victim.train)(**arguments)


if __name__ == "__main__":
    serve(train)
