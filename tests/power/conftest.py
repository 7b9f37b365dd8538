"""Lets these tests import the modules that stand beside them and those of the checkpoint's tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "checkpoint")]
