"""What several ranks of one machine want of a checkpoint behind a network is fetched once."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from forking import Zygote
from hypothesis import given
from hypothesis import strategies as st
from jobs import Job

from holdfast.checkpoint.machine_cache import WantedHere, share_fetching
from holdfast.core.contract import ENV_STAGED

WANTED = st.lists(
    st.builds(
        lambda machine, room, numbers: WantedHere(machine, room, {f"data/{n}": 10 * n + 1 for n in numbers}),
        st.sampled_from(["", "a", "b"]), st.integers(0, 400), st.sets(st.integers(0, 12)),
    ), min_size=1, max_size=6,
)  # fmt: skip


@given(ranks=WANTED)
def test_each_is_fetched_once_by_one_that_wants_it(ranks: list[WantedHere]) -> None:
    plan = share_fetching(ranks, "run", 3)
    for machine in {one.machine for one in ranks}:
        here = [number for number, one in enumerate(ranks) if one.machine == machine]
        fetched = [key for number in here for key in plan[number].keys]
        assert len(fetched) == len(set(fetched))
        for number in here:
            for key in plan[number].keys:
                size = ranks[number].sizes_bytes[key]
                assert sum(key in ranks[other].sizes_bytes for other in here) > 1
                assert size <= ranks[number].room_bytes
        total = sum(ranks[number].sizes_bytes[key] for number in here for key in plan[number].keys)
        assert total <= min(ranks[number].room_bytes for number in here)
        if machine == "":
            assert not fetched


def reads_of_restore(job: Job, per_machine: int, size: int = 2) -> list[set[str]]:
    """Which data each rank reads from the store when the job is started again."""
    job.start(size, pace_s=0.02)
    job.until_step(4)
    job.signal(0, signal.SIGTERM)
    job.wait()
    job.finish(size, far=True, per_machine=per_machine)
    return [
        {line.split()[0] for line in path.read_text().splitlines() if line.startswith("data/")}
        for path in sorted(job.folder.glob("run.reads-*"))
    ]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_restore_on_one_machine(zygote: Zygote, tmp_path: Path, kind: str) -> None:
    job = Job(zygote, tmp_path / "a", kind=kind)
    first, second = reads_of_restore(job, per_machine=2)
    assert first | second
    # The place in the loop is read by each rank for itself, and lies in its own objects.
    assert not first & second, "an object was fetched by both ranks"
    assert not list(Path("/dev/shm").glob("holdfast-restore-*")), "memory was not given back"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_a_standby_has_fetched_ahead_is_read_by_each_rank_and_by_none_from_the_store(
    zygote: Zygote, tmp_path: Path, kind: str
) -> None:
    job, staged = Job(zygote, tmp_path / "a", kind=kind), tmp_path / "staged"
    job.start(2, pace_s=0.02)
    job.until_step(4)
    job.signal(0, signal.SIGTERM)
    job.wait()
    shutil.copytree(job.url / "data", staged / "data")
    other = Job(zygote, tmp_path / "b", kind=kind)
    shutil.copytree(job.url, other.url)
    job.environ[ENV_STAGED] = str(staged)
    assert job.finish(2, far=True, per_machine=2) == other.finish(2)
    lines = [line.split() for path in job.folder.glob("run.reads-*") for line in path.read_text().splitlines()]
    assert {root for key, _, root in lines if key.startswith("data/")} == {str(staged)}
