"""What the ranks of a job leave in memory when they are killed: committed, and read from, wherever the next ones find it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from forking import Zygote
from jobs import Job
from waiting import eventually

from holdfast.agent.control import ControlSocket
from holdfast.agent.heir import rescue
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.handover import left_behind
from holdfast.core.clock import SystemClock
from holdfast.core.events import Event
from holdfast.store.local import LocalStore


class Machines:
    """What agents hold on each of some machines: the control folder that the ranks there get, and the socket in it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.sockets: dict[int, ControlSocket] = {}

    def control(self, number: int) -> str:
        folder = self.folder / f"machine-{number}"
        if number not in self.sockets:
            folder.mkdir(parents=True)
            self.sockets[number] = self._stack.enter_context(_Closing(ControlSocket(folder, lambda notice: None)))
        return str(folder)

    def replace(self, number: int) -> None:
        """Another machine in its place."""
        self.sockets.pop(number).close()
        (self.folder / f"machine-{number}").rename(self.folder / f"gone-{number}-{len(list(self.folder.iterdir()))}")

    def steps_left(self) -> list[int]:
        return sorted(left.share.step for path in self.folder.glob("machine-*") for left in left_behind(path))


class _Closing(ExitStack):
    def __init__(self, control: ControlSocket) -> None:
        super().__init__()
        self.control = control
        self.callback(control.close)

    def __enter__(self) -> ControlSocket:  # type: ignore[override]
        return self.control


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with ExitStack() as stack:
        yield Machines(tmp_path / "machines", stack)


@pytest.fixture(scope="module", params=[pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(zygote: Zygote, kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Job(zygote, tmp_path_factory.mktemp("reference"), kind=kind).finish()


def killed_with_a_save_in_memory(job: Job, on: dict[int, dict[str, Any]], size: int = 2) -> int:
    """All ranks are killed while the store takes nothing. The step that every rank holds in memory and that is not durable."""
    job.start(size, pace_s=0.02, for_rank=on)
    eventually(lambda: job.durable_step() >= 3, job.said)
    block = Path(f"{job.url}.block")
    block.touch()
    controls = {Path(one["control"]) for one in on.values()}

    def held_by_all() -> set[int]:
        lefts = [left for folder in controls for left in left_behind(folder)]
        steps = [{left.share.step for left in lefts if left.share.rank == rank} for rank in range(size)]
        return {step for step in set.intersection(*steps) if step > job.durable_step()}

    eventually(held_by_all, job.said)
    for rank in range(size):
        job.signal(rank, signal.SIGKILL)
    job.wait()
    block.unlink()
    newest = max(held_by_all(), default=0)
    assert newest > job.durable_step()
    return newest


def by_agent(control: str, socket: ControlSocket) -> CheckpointRef | None:
    class Told:
        def emit(self, event: Event) -> None: ...

    def open_plain(url: str) -> LocalStore:
        return LocalStore(url.removeprefix("file://"))

    return rescue(Path(control), socket.slots(), open_store=open_plain, clock=SystemClock(), sink=Told(), say=print)


def test_an_agent_commits_what_all_ranks_of_its_machine_left(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], machines: Machines, tmp_path: Path
) -> None:
    job = Job(zygote, tmp_path / "a", kind=kind)
    control = machines.control(0)
    newest = killed_with_a_save_in_memory(job, {rank: {"control": control} for rank in range(2)})
    ref = by_agent(control, machines.sockets[0])
    assert ref is not None
    assert ref.step == newest == job.durable_step()
    assert by_agent(control, machines.sockets[0]) is None
    assert job.finish(for_rank={rank: {"control": control} for rank in range(2)}) == reference


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_the_next_ranks_commit_what_two_machines_hold(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], machines: Machines, tmp_path: Path, size: int
) -> None:
    """Started anew, on the same machines, as another number of ranks: nothing that was in memory is lost."""
    job = Job(zygote, tmp_path / "a", kind=kind, global_batch=12 if size != 2 else None)
    on = {rank: {"control": machines.control(rank % 2 if size > 1 else 0)} for rank in range(2)}
    newest = killed_with_a_save_in_memory(job, on)
    if size > 1:
        assert by_agent(machines.control(0), machines.sockets[0]) is None, "one machine alone holds no whole state"
    after = {rank: {"control": machines.control(rank % 2 if size > 1 else 0)} for rank in range(size)}
    outcome = job.finish(size, for_rank=after)
    assert f"committed the snapshot of step {newest} that the last trainers left in memory" in job.said()
    assert f"attempt 2 resumes at step {newest} " in job.said()
    if size == 2:
        assert outcome == reference


def test_without_one_of_the_machines_the_newest_checkpoint_is_what_there_is(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], machines: Machines, tmp_path: Path
) -> None:
    job = Job(zygote, tmp_path / "a", kind=kind)
    killed_with_a_save_in_memory(job, {rank: {"control": machines.control(rank)} for rank in range(2)})
    durable = job.durable_step()
    machines.replace(1)
    assert job.finish(for_rank={rank: {"control": machines.control(rank)} for rank in range(2)}) == reference
    assert f"attempt 2 resumes at step {durable} " in job.said()


def test_who_begins_anew_takes_nothing_over(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], machines: Machines, tmp_path: Path
) -> None:
    job = Job(zygote, tmp_path / "a", kind=kind)
    on = {rank: {"control": machines.control(rank)} for rank in range(2)}
    killed_with_a_save_in_memory(job, on)
    assert job.finish(for_rank=on, fresh=True) == reference
    assert "attempt 2 starts " in job.said()


def test_what_lies_in_memory_is_not_fetched(zygote: Zygote, kind: str, machines: Machines, tmp_path: Path) -> None:
    """The same ranks on the same machines go on without any data of the store, here gone; hashes are compared all the same."""
    job = Job(zygote, tmp_path / "a", kind=kind)
    on = {rank: {"control": machines.control(rank)} for rank in range(2)}
    killed_with_a_save_in_memory(job, on)
    for path in job.url.glob("data/**/*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    job.start(2, pace_s=0.05, for_rank=on)
    eventually(lambda: job.step() > job.durable_step() + 1, job.said)
    for rank in range(2):
        job.signal(rank, signal.SIGKILL)
    job.wait()
