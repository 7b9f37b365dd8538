"""What grows with the number of ranks, and what must not: counted in jobs of 8 to 64 simulated ranks (at_scale.py).

And what keeps it so: a reader that gets no more parts than it needs, a short answer to who holds what, a hub that may open enough
connections.
"""

from __future__ import annotations

import os
import resource
import threading
from itertools import pairwise

import msgspec
import pytest
from at_scale import GIVE_UP_S, CountingStore
from at_scale_figures import Figures, Job, figures, talked_to
from at_scale_states import Fsdp, Replicas, State
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.arrays import ArraySpec
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.tree import FlatTree
from holdfast.core.errors import FormatError, IntegrityError, NotFound, UsageError
from holdfast.train.ranks.hub import Hub, Spoke
from holdfast.train.ranks.sharing import _Agreed, _compare, _Contents, _decoded, _lost, _with

SIZES = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def found() -> dict[int, Figures]:
    return {size: figures(size, parameters=8, rows=64) for size in SIZES}


def test_nothing_grows_faster_than_linearly(found: dict[int, Figures]) -> None:
    """Numbers of ranks and lengths have more digits in a larger job: five per cent are theirs."""
    faster = []
    for smaller, larger in pairwise(SIZES):
        for name, value in found[larger].items():
            linear = found[smaller].get(name, 0.0) * talked_to(name, larger) / talked_to(name, smaller)
            if not name.endswith("_s") and value > 1.05 * linear:
                faster.append(f"{name}: {found[smaller].get(name)} on {smaller} ranks, {value} on {larger}")
    assert not faster, "\n".join(faster)


def test_words_for_each_member(found: dict[int, Figures]) -> None:
    for size, each in found.items():
        members = size - 1
        assert each["join.words"] == members
        assert each["stop, one wishes.words"] == 3 * members + 1  # the wish; ask, promise, act
        assert each["stop, all wish.words"] == 4 * members
        assert each["notice, all hear.words"] == 2 * members
        assert each["share.ddp.words"] == each["share.fsdp.words"] == 2 * members  # say, answer
        assert each["save.fsdp.changed.words"] == 3 * members  # begin, ready, done
        assert each["one dies in phase one.words"] == 3 * members - 2


def test_what_does_not_depend_on_the_number_of_ranks(found: dict[int, Figures]) -> None:
    first = found[SIZES[0]]
    requests = [name for name in first if name.startswith("save.") and ".rank_0." in name and name.count(".") == 4]
    assert requests
    for each in found.values():
        for kind in ("ddp", "fsdp"):
            assert each[f"save.{kind}.first.member.requests"] == each[f"save.{kind}.changed.member.requests"] == 2
            assert each[f"save.{kind}.unchanged.member.requests"] == 1
        assert {name: each[name] for name in requests} == {name: first[name] for name in requests}
        # Root, own part, rank 0's part, and what lies in the objects of both.
        assert each["restore.fsdp.same.requests"] <= 6
        assert each["restore.fsdp.half.requests"] <= 8
        assert each["restore.ddp.same.requests"] <= 20
        assert each["save.fsdp.changed.largest_part_bytes"] <= 1.01 * first["save.fsdp.changed.largest_part_bytes"]


# ---- no more parts than are needed


class _Written:
    def __init__(self, size: int, state: State) -> None:
        self.job = Job(size, state)
        if isinstance(state, Replicas):
            self.job.world.in_turn(lambda rank: state.agree(self.job.world.ranks[rank]))
        self.ref: CheckpointRef = self.job.save(1).ref

    def read(self, rank: int, size: int) -> None:
        self.job.read_back(self.ref, CountingStore(self.job.objects), rank, size)


@pytest.mark.parametrize("rows", [5, 50, 64])
def test_every_rank_of_any_world_gets_its_bytes(rows: int) -> None:
    """Rows that cannot be cut evenly, and fewer of them than ranks: then the parts looked into first are the wrong ones."""
    for written in (_Written(6, Fsdp(4, rows, 6)), _Written(6, Replicas(4, rows, 6))):
        for size in range(1, 10):
            for rank in range(size):
                written.read(rank, size)


def test_damage_is_found_by_those_who_need_what_is_damaged() -> None:
    written = _Written(6, Fsdp(4, 60, 6))
    key = f"{written.ref.name}/part-4"
    data = written.job.objects.get(key, max_bytes=1 << 20)
    written.job.objects.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        written.read(4, 6)
    written.job.objects.delete(key)
    for rank, size in ((4, 6), (2, 3), (0, 1)):
        with pytest.raises(NotFound):
            written.read(rank, size)
    for rank in (0, 1, 2, 3, 5):
        written.read(rank, 6)


def test_a_shard_that_nobody_has_written_is_no_memory_of_anything() -> None:
    state = Fsdp(4, 60, 6)
    whole = state.flat(3)
    state._flat[3] = FlatTree(whole.document, whole.leaves[1:])
    written = _Written(6, state)
    with pytest.raises(FormatError, match="has a hole"):
        written.read(3, 6)
    written.read(2, 6)


# ---- who holds what, in few words


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=4), st.sets(st.integers(0, 6))
)
def test_all_are_told_who_holds_what(tensors: list[list[int]], left: set[int]) -> None:
    """Each tensor is given by the shard that each of seven ranks holds. A tensor has the rows that somebody holds."""
    payloads = []
    cut = [sorted(set(each)) for each in tensors]
    for rank in range(7):
        specs = [
            ArraySpec(str(number), "f32", (1, 2), (len(rows), 2), (rows.index(each[rank]), 0), "torch")
            for number, (each, rows) in enumerate(zip(tensors, cut, strict=True))
        ]
        payloads.append(msgspec.msgpack.encode(_Contents({}, [(spec, b"same") for spec in specs])))
    agreed = msgspec.msgpack.decode(_compare(payloads), type=_Agreed)
    for number, each in enumerate(tensors):
        partition = _decoded(agreed.partitions[agreed.sharded[str(number)]])
        for rank in range(7):
            assert _with(partition, rank) == tuple(other for other in range(7) if each[other] == each[rank])
        lost = _lost(partition, sorted(left))
        missing = set(each) - {each[rank] for rank in left}
        assert (lost is None) == (not missing)
        assert lost is None or {each[rank] for rank in lost} <= missing


# ---- descriptors


def test_a_hub_of_more_ranks_than_files_may_be_open() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    members, arrived, all_there = 40, set(), threading.Event()
    spokes: list[Spoke] = []

    def heard(rank: int, word: object) -> None:
        arrived.add(rank)
        if len(arrived) == members:
            all_there.set()

    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        hub = Hub("127.0.0.1", members + 1, "secret", heard, lambda rank: None)
        hub.start()
        try:
            for rank in range(1, members + 1):
                spokes.append(Spoke("127.0.0.1", hub.port, rank, "secret", lambda word: None, lambda: None))
            assert all_there.wait(GIVE_UP_S)
        finally:
            for spoke in spokes:
                spoke.close()
            hub.close()
        if before[1] != resource.RLIM_INFINITY:
            with pytest.raises(UsageError, match="ulimit -n"):
                Hub("127.0.0.1", before[1] + 1, "secret", heard, lambda rank: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
