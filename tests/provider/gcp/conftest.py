"""Lets these tests import what stands beside them; without Google's client library there is nothing to test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore_glob = [] if importlib.util.find_spec("googleapiclient") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _front_of_all() -> Iterator[None]:
    from gcp_stand_in import front

    with front():
        yield
