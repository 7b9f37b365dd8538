"""Invariant 5: the cap on staging holds for the whole process tree, forked loader workers included, however slow the store is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20


@pytest.mark.parametrize(("cap_mib", "expected_slots"), [pytest.param(64, 2, marks=pytest.mark.long), (40, 1)])
def test_staging_stays_under_the_cap(cap_mib: int, expected_slots: int) -> None:
    script = Path(__file__).parent / "crowded.py"
    done = subprocess.run(
        [sys.executable, str(script), str(cap_mib * MIB), "4"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["processes"] >= 5
    assert 20 * MIB < measured["most_bytes"] <= measured["cap_bytes"]
    assert measured["mapped_bytes"] // (24 * MIB) == expected_slots
