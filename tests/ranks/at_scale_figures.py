"""The figures of a simulated job: words, bytes, requests, sizes and rank 0's time, for each of the things that ranks do together.

    join → share out → agree on a stop → save, save again, save and sweep → open again → restore here, and on half of the ranks

`figures` runs all of it with the real protocol (at_scale.py) and checks on the way that it does what it should: everybody acts at
one step, everybody is told of the same checkpoint, and restored bytes are those that were saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from at_scale import CountingStore, Inline, Requests, Traffic, World
from at_scale_states import WRITERS, Fsdp, Replicas, State, hybrid_payloads

from holdfast.checkpoint import shares
from holdfast.checkpoint.commit import Committed
from holdfast.checkpoint.format import CheckpointRef, Head, RunRecord, head_key
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.joint import JointCommitter, MemberCommitter
from holdfast.checkpoint.rank_reader import open_for_rank
from holdfast.checkpoint.read import Target
from holdfast.checkpoint.retain import Keep, root_key
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.core.contract import NoticeWord
from holdfast.core.errors import SaveError
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.train.devices import Device
from holdfast.train.opening import Claim
from holdfast.train.ranks.joining import claim_together, restore_together
from holdfast.train.ranks.sharing import _compare
from holdfast.train.ranks.words import Act, Wish, encode_notice

__all__ = ["Figures", "Job", "figures", "talked_to"]

Figures = dict[str, float]
_RUN = "a run"
_DEVICE = Device("NVIDIA H100 80GB HBM3", 85_017_493_504, (9, 0))


def figures(
    size: int, *, parameters: int = 300, rows: int = 1024, restoring: Callable[[int], Sequence[int]] | None = None
) -> Figures:
    """All figures for a job of so many ranks. `restoring`: which ranks of so many restore; all, if it is None.

    Times end in `_s`; everything else is the same in every run.
    """
    found: Figures = {}
    world = World(size)
    with world.measured() as traffic:
        world.join()
    _note(found, "join", traffic)
    _agreements(world, found)
    for shards, which in ((4, "four shards"), (size // 2, "two replicas")):
        answer = _compare(hybrid_payloads(parameters, size, shards))
        found[f"share.hsdp, {which}.bytes_from_rank_0"] = (size - 1) * len(answer)
    states: tuple[State, ...] = (Replicas(parameters, 128, size), Fsdp(parameters, rows, size))
    for state in states:
        _life(size, state, found, restoring or range)
    _death(size, states[-1], found)
    return found


def talked_to(name: str, size: int) -> int:
    """How many members take part in what a figure of a job of `size` ranks tells of: linear means in proportion to them."""
    return size // 2 - 1 if ".half." in name else size - 2 if name.startswith("one dies") else size - 1


# ---- words without a store


def _agreements(world: World, found: Figures) -> None:
    with world.measured() as traffic:
        world.ranks[world.size // 2].wish(Wish("save", "somebody asked for it"))
        _acts(world, 1, "save")
    _note(found, "stop, one wishes", traffic)
    with world.measured() as traffic:
        with world.words_from_chair_held():
            for together in world.ranks:
                with world.meter.of(chair=together.coordinates):
                    together.wish(Wish("leave", "terminated", 75))
        _acts(world, 2, "leave")
    _note(found, "stop, all wish", traffic)
    for number, (which, ranks) in enumerate((("one hears", world.ranks[-1:]), ("all hear", world.ranks))):
        with world.measured() as traffic:
            for together in ranks:
                with world.meter.of(chair=together.coordinates):
                    together.tell(_notice(together.rank, 1_800_000_000.0 + 60 * number))
        _note(found, f"notice, {which}", traffic)


def _notice(rank: int, deadline_unix_s: float) -> bytes:
    """All ranks know of one deadline, and each has an id for it of its own."""
    word = NoticeWord(
        kind="termination", deadline_unix_s=deadline_unix_s, source="signal", id=f"signal-{rank}-{deadline_unix_s:.0f}",
        heard_unix_s=1.0,
    )  # fmt: skip
    return encode_notice(word)


def _acts(world: World, step: int, kind: str) -> None:
    """Everybody comes to boundary `step`, and does the same there."""
    acts: list[Act | None] = []
    for together in world.ranks:
        with world.meter.of(chair=together.coordinates):
            acts.append(together.boundary(step))
    assert len(set(acts)) == 1
    assert acts[0] is not None
    assert (acts[0].step, acts[0].kind) == (step, kind)


# ---- a run


class Job:
    """A run of so many ranks on a store that they share, with a committer for each."""

    def __init__(self, size: int, state: State) -> None:
        self.world, self.state = World(size), state
        self.objects = MemoryStore()
        self.stores = [CountingStore(self.objects) for _ in range(size)]
        self.lineage = Lineage(self.stores[0], _RUN, clock=self.world.clock, tokens=seeded_tokens(-1))
        self.lineage.claim()
        self.world.join()
        inline = Inline()
        self.chair = JointCommitter(
            self.stores[0], self.lineage, keep=Keep(last=1), open_home=self._no_home, clock=self.world.clock,
            tokens=seeded_tokens(0), hashing=inline, sending=inline, chair=self.world.ranks[0],
        )  # fmt: skip
        self.members = {
            rank: MemberCommitter(
                self.stores[rank], member=self.world.ranks[rank], open_home=self._no_home, tokens=seeded_tokens(rank),
                hashing=inline, sending=inline,
            )
            for rank in range(1, size)
        }  # fmt: skip
        self.take_requests()

    def take_requests(self) -> list[Requests]:
        return [store.take() for store in self.stores]

    def commit(self, rank: int, step: int) -> Committed:
        flat = self.state.flat(rank)
        ranks = self.world.everybody
        snapshot = stream(
            flat, lay_out(flat), step=step, epoch=0, metadata={"step": step, "world_size": len(ranks)}, ranks=ranks
        )
        return self.chair.commit(snapshot) if rank == 0 else self.members[rank].commit(snapshot)

    def save(self, step: int) -> Committed:
        outcomes = self.world.in_turn(lambda rank: self.commit(rank, step))
        committed = outcomes[0]
        if isinstance(committed, Exception):
            raise committed
        assert all(isinstance(each, Committed) and each.ref == committed.ref for each in outcomes.values()), outcomes
        return committed

    def read_back(self, ref: CheckpointRef, store: Store, rank: int, size: int) -> None:
        """What `rank` of `size` needs of a checkpoint, into memory of its own; and it is what it should be."""
        reader = open_for_rank(store, ref, self._no_home, rank=rank, world_size=size)
        reader.document(rank if reader.root.world_size == size else 0)
        wanted = [(name, rectangle, bytearray(data), data) for name, rectangle, data in self.state.wanted(rank, size)]
        targets: list[Target] = []
        for name, rectangle, memory, _ in wanted:
            array = reader.find(name)
            assert array is not None, name
            targets.append(Target(array, memoryview(memory), rectangle))
        with ThreadPoolExecutor(1) as pool:
            reader.read(targets, pool)
        assert all(memory == data for _, _, memory, data in wanted)

    def bytes_of(self, key: str) -> int:
        return len(self.objects.get(key, max_bytes=1 << 30))

    def _no_home(self, url: str) -> Store:
        raise AssertionError(url)


def _life(size: int, state: State, found: Figures, restoring: Callable[[int], Sequence[int]]) -> None:
    job, label = Job(size, state), state.kind
    with job.world.measured() as traffic, _small_stretches(state.total_bytes):
        said = job.world.in_turn(lambda rank: state.agree(job.world.ranks[rank]))
    assert not any(isinstance(each, Exception) for each in said.values()), said
    _note(found, f"share.{label}", traffic)
    for step, which in enumerate(("first", "unchanged", "changed"), start=1):
        if which == "changed":
            state.change()
        _save(job, step, f"save.{label}.{which}", found)
    _restore(job, size, f"restore.{label}.same", found, restoring(size))
    if size >= 4:
        _restore(job, size // 2, f"restore.{label}.half", found, restoring(size // 2))


@contextmanager
def _small_stretches(total_bytes: int) -> Iterator[None]:
    """Tensors are small here, and so is the least that a rank writes of what all have."""
    before_bytes = shares.LEAST_STRETCH_BYTES
    shares.LEAST_STRETCH_BYTES = total_bytes // WRITERS
    try:
        yield
    finally:
        shares.LEAST_STRETCH_BYTES = before_bytes


def _save(job: Job, step: int, label: str, found: Figures) -> None:
    job.take_requests()
    with job.world.measured() as traffic:
        committed = job.save(step)
    _note(found, label, traffic)
    _note_requests(found, label, job.take_requests())
    assert committed.written is not None
    root = committed.written.root
    parts = [part.size_bytes for part in root.parts]
    found[f"{label}.root_bytes"] = job.bytes_of(root_key(root.name))
    found[f"{label}.largest_part_bytes"] = max(parts)
    found[f"{label}.index_bytes"] = found[f"{label}.root_bytes"] + sum(parts)
    found[f"{label}.head_bytes"] = job.bytes_of(head_key(job.lineage.head.number))
    with job.world.measured() as traffic, job.world.meter.of(chair=True):
        deleted = job.chair.sweep()
    found[f"{label}.swept"] = len(deleted)
    found[f"{label}.sweep_requests"] = job.take_requests()[0].total
    found[f"{label}.sweep_s"] = traffic.cpu_s


def _death(size: int, state: State, found: Figures) -> None:
    """A rank dies in phase one: everybody hears of it at once. Whoever waited for a deadline would never end here."""
    job, dying = Job(size, state), size // 2

    def commit(rank: int) -> Committed:
        if rank == dying:
            job.world.lose(rank)
            raise SystemError("its process has died")
        return job.commit(rank, 1)

    with job.world.measured() as traffic:
        outcomes = job.world.in_turn(commit)
    assert all(isinstance(outcomes[rank], SaveError) for rank in range(size) if rank != dying), outcomes
    assert f"rank {dying} ended" in str(outcomes[0])
    _note(found, "one dies in phase one", traffic)


# ---- the next start


def _restore(job: Job, size: int, label: str, found: Figures, ranks: Sequence[int]) -> None:
    """The same run is opened by `size` ranks, of which `ranks` read what they need."""
    world, chosen = World(size), set(ranks)
    world.join()
    stores = [CountingStore(job.objects) for _ in range(size)]
    head = read_truth(job.objects, _RUN).head
    assert head is not None
    opened: dict[int, Head] = {}

    def restore(rank: int) -> None:
        claim, _ = claim_together(world.ranks[rank], lambda: Claim(_record(), head, None, False), _DEVICE)
        assert claim.head is not None
        opened[rank] = claim.head
        restore_together(
            world.ranks[rank], claim.head.checkpoints,
            lambda ref: job.read_back(ref, stores[rank], rank, size) if rank in chosen else None,
            fell_back=lambda fallback: None, url="memory",
        )  # fmt: skip

    with world.measured() as traffic:
        outcomes = world.in_turn(restore)
    assert not any(isinstance(each, Exception) for each in outcomes.values()), outcomes
    assert all(head.checkpoints == mine.checkpoints for mine in opened.values())
    _note(found, label, traffic)
    read = [stores[rank].take() for rank in ranks]
    found[f"{label}.requests"] = max(each.total for each in read)
    found[f"{label}.index_bytes"] = max(each.index_bytes for each in read)
    found[f"{label}.all_requests"] = round(sum(each.total for each in read) / len(read) * size)


def _record() -> RunRecord:
    return RunRecord(format=1, run_id=_RUN, created_unix_s=0.0, name="simulated")


# ---- notes


def _note(found: Figures, label: str, traffic: Traffic) -> None:
    found[f"{label}.words"] = traffic.words
    found[f"{label}.bytes_to_rank_0"] = traffic.arriving_bytes
    found[f"{label}.bytes_from_rank_0"] = traffic.leaving_bytes
    found[f"{label}.rank_0_s"] = traffic.cpu_s


def _note_requests(found: Figures, label: str, requests: Sequence[Requests]) -> None:
    for kind, count in sorted(requests[0].counts.items()):
        found[f"{label}.rank_0.{kind}"] = count
    found[f"{label}.rank_0.requests"] = requests[0].total
    found[f"{label}.member.requests"] = max((each.total for each in requests[1:]), default=0)
    found[f"{label}.all_requests"] = sum(each.total for each in requests)
