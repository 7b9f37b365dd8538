"""Forks trainings of pl_victim.py (tests/support/forking.py)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.extend(str(folder) for folder in (HERE, HERE.parent / "kills", HERE.parent / "support"))

import pl_victim  # noqa: E402
from forking import serve  # noqa: E402

if __name__ == "__main__":
    serve(pl_victim.train)
