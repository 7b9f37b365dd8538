"""Forks victims (tests/support/forking.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import victim

sys.path.append(str(Path(__file__).parents[1] / "support"))

from forking import serve

if __name__ == "__main__":
    serve(victim.train)
