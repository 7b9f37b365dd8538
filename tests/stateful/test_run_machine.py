"""Any order of claims, saves, sweeps, restores, crashes, zombies, rollbacks and forks, on three kinds of store that misbehave."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import RunMachine
from places import BUCKET, BriskClock, BucketPlace, FolderPlace, MemoryPlace

from holdfast.core.errors import UsageError
from holdfast.testing.http_faults import FaultyProxy, faulty_proxy
from holdfast.testing.servers import ObjectServer, ministack_server

_LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


def attack(make: Callable[[], RunMachine], *, examples: int, long: int) -> None:
    """The same examples at every run; many more and new ones at the long scale."""
    run_state_machine_as_test(
        make,  # type: ignore[arg-type]  # any callable will do
        settings=settings(
            max_examples=long if _LONG else examples,
            stateful_step_count=20,
            derandomize=not _LONG,
            print_blob=_LONG,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_run_in_memory() -> None:
    attack(lambda: RunMachine(MemoryPlace()), examples=150, long=2000)


def test_a_run_in_a_folder(tmp_path: Path) -> None:
    attack(lambda: RunMachine(FolderPlace(tmp_path)), examples=25, long=600)


class BucketMachine(RunMachine):
    network = True


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[ObjectServer, FaultyProxy]]:
    running = ministack_server()
    try:
        server = running.__enter__()
    except UsageError as missing:
        if os.environ.get("HOLDFAST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(missing))
    try:
        server.make_bucket(BUCKET)
        with faulty_proxy(server.endpoint, lambda exchange: None, clock=BriskClock()) as proxy:
            yield server, proxy
    finally:
        running.__exit__(None, None, None)


def test_a_run_in_a_bucket(bucket: tuple[ObjectServer, FaultyProxy]) -> None:
    attack(lambda: BucketMachine(BucketPlace(*bucket)), examples=8, long=250)
