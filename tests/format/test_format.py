"""Two readers that share nothing but docs/checkpoint-format.md read the same: the committed sample of every old format, and runs
written now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import make_fixture
from independent_reader import Reader
from same_bits import plain, read_by_holdfast

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.runs.fork import fork
from holdfast.core.ids import seeded_tokens
from holdfast.store.local import LocalStore
from holdfast.store.open import open_store

SAMPLE = Path(__file__).parent / "v1"


@pytest.mark.parametrize(
    ("name", "steps"), [(make_fixture.SOURCE, [10, 20]), (make_fixture.FORK, [20, 30])], ids=["source", "fork"]
)
def test_the_sample_of_format_1_reads_as_it_was_written(name: str, steps: list[int]) -> None:
    folders = make_fixture.folders(SAMPLE)
    stores = {url: LocalStore(folder) for url, folder in folders.items()}
    url, reader = f"memory://fixture-{name}", Reader(folders)
    truth = read_truth(stores[url])
    assert truth.head is not None
    assert truth.altered == ()
    assert [ref.step for ref in truth.head.checkpoints] == steps
    for ours, theirs in zip(truth.head.checkpoints, reader.head(url)["checkpoints"], strict=True):
        expected = plain(make_fixture.tree(ours.step))
        assert plain(read_by_holdfast(stores[url], ours, stores.__getitem__)) == expected
        state = reader.state(url, theirs)
        assert plain(state) == expected
        assert state["tracked"]["model"]["emb.weight"] is state["tracked"]["model"]["head.weight"]
    assert plain(reader.newest(url)) == plain(make_fixture.tree(steps[-1]))


def test_the_sample_of_three_ranks_reads_as_it_was_written() -> None:
    """Arrays in stretches, in columns, in tiles, in one part of three; and what is each rank's own."""
    folders = make_fixture.folders(SAMPLE)
    stores = {url: LocalStore(folder) for url, folder in folders.items()}
    url = f"memory://fixture-{make_fixture.RANKS}"
    head, reader = read_truth(stores[url]).head, Reader(folders)
    assert head is not None
    (ours,), (theirs,) = head.checkpoints, reader.head(url)["checkpoints"]
    assert len(open_checkpoint(stores[url], ours, stores.__getitem__).parts) == make_fixture.WORLD_SIZE
    for rank in range(make_fixture.WORLD_SIZE):
        expected = plain(make_fixture.ranks_tree(rank))
        assert plain(read_by_holdfast(stores[url], ours, stores.__getitem__, rank)) == expected
        assert plain(reader.state(url, theirs, rank)) == expected


def test_the_sample_is_small_and_refers_across_checkpoints_and_runs() -> None:
    """What the sample is for must be in it: bytes shared between checkpoints, and borrowed from another run."""
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 200_000
    folders = make_fixture.folders(SAMPLE)
    source, borrower, ranks = (LocalStore(folder) for folder in folders.values())
    opener = dict(zip(folders, (source, borrower, ranks), strict=True)).__getitem__
    heads = [read_truth(store).head for store in (source, borrower)]
    first, second = (open_checkpoint(source, ref, opener) for ref in heads[0].checkpoints)  # type: ignore[union-attr]
    assert set(first.root.objects) & set(second.root.objects)
    borrowed, own = heads[1].checkpoints  # type: ignore[union-attr]
    assert borrowed.home == next(iter(folders))
    assert open_checkpoint(borrower, own, opener).root.homes == [borrowed.home]
    dtypes = {array.dtype for array in second.arrays.values()}
    assert len(dtypes) == len(make_fixture.every_dtype())


def test_the_same_code_makes_the_same_sample(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        make_fixture.make(tmp_path / name)
        made.append(
            {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json")}
        )
    assert made[0] == made[1]


def test_both_read_large_packed_shared_and_borrowed_arrays(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    # Three chunks, the last of them not a whole number of blocks; and 50 small arrays that are packed into one object.
    large = torch.randint(0, 256, (34_000_001,), dtype=torch.uint8, generator=generator)
    small = {f"{index}": torch.rand(index * 7, generator=generator) for index in range(50)}

    def state(step: int) -> dict[str, Any]:
        moving = torch.full((1000,), float(step), dtype=torch.bfloat16)
        return {"tracked": {"large": large, "strided": large[::1000], "small": small, "moving": moving}, "holdfast": {}}

    source, target = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "forked")
    tokens = seeded_tokens(0)
    with make_fixture.Attempt(source, open_store, tokens) as attempt:
        for step in (1, 2):
            attempt.save(step, state(step))
    fork(source.url, target.url, open_home=open_store, clock=make_fixture.StoppedClock(), tokens=tokens)
    with make_fixture.Attempt(target, open_store, tokens) as attempt:
        attempt.save(3, state(3))
    reader = Reader({store.url: Path(store.url.removeprefix("file://")) for store in (source, target)})
    for store, steps in ((source, [1, 2]), (target, [2, 3])):
        head = read_truth(store).head
        assert head is not None
        assert [ref.step for ref in head.checkpoints] == steps
        for ours, theirs in zip(head.checkpoints, reader.head(store.url)["checkpoints"], strict=True):
            expected = plain(state(ours.step))
            assert plain(reader.state(store.url, theirs)) == expected
            assert plain(read_by_holdfast(store, ours, open_store)) == expected
    own = sum(entry.size_bytes for entry in target.list("data/"))
    assert own < 10_000  # the large ones are borrowed


@pytest.mark.parametrize("run", [make_fixture.SOURCE, make_fixture.RANKS])
@pytest.mark.parametrize("kind", ["heads", "checkpoints", "data"])
def test_the_independent_reader_refuses_an_altered_byte(tmp_path: Path, kind: str, run: str) -> None:
    """So the document says enough about hashes to find damage anywhere."""
    make_fixture.make(tmp_path)
    reader, url = Reader(make_fixture.folders(tmp_path)), f"memory://fixture-{run}"
    reader.newest(url)
    newest = max((tmp_path / run / "heads").iterdir())
    passed_over = "00000002-" if run == make_fixture.SOURCE else "no checkpoint"
    for path in sorted((tmp_path / run / kind).rglob("*")):
        if path.is_file() and (kind != "heads" or path == newest) and passed_over not in str(path):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            with pytest.raises(AssertionError):
                reader.newest(url)
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    reader.newest(url)
