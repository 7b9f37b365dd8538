"""Checkpoints of several processes: written in every way of sharding, restored in every other, on more ranks and on fewer."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from forking import Zygote

sys.path.insert(0, str(Path(__file__).parent))
from resharding import run

from holdfast.checkpoint.dtensors import _chunk, _strided

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def test_every_sharding_is_restored_in_every_other_on_four_ranks_and_fewer(zygote: Zygote, tmp_path: Path) -> None:
    # One start of four processes for all that needs them.
    run(zygote, "places,strange,write_all,read_all", tmp_path, 4)


@pytest.mark.long
@pytest.mark.parametrize(("writers", "readers"), [(2, 4), (4, 8), (3, 2), (1, 3), (8, 4)])
def test_every_sharding_is_restored_on_other_numbers_of_ranks(
    zygote: Zygote, tmp_path: Path, writers: int, readers: int
) -> None:
    run(zygote, "write_all", tmp_path, writers)
    run(zygote, "read_all", tmp_path, readers)


def test_after_a_restore_training_goes_on_as_if_nothing_had_happened(zygote: Zygote, tmp_path: Path) -> None:
    run(zygote, "restored_goes_on", tmp_path, 2)


def test_pieces_are_those_that_torch_cuts() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        size, count = chooser.randrange(12), chooser.randrange(1, 6)
        chunks = torch.arange(size).chunk(count) if size else ()
        for index in range(count):
            numbers = [n for start, stop in _chunk([(0, size)], count, index) for n in range(start, stop)]
            assert numbers == (chunks[index].tolist() if index < len(chunks) else [])
    private = pytest.importorskip("torch.distributed.tensor._utils")
    placements = pytest.importorskip("torch.distributed.tensor.placement_types")
    compute = private._compute_local_shape_and_global_offset
    for _ in range(100):
        count, factor = chooser.randrange(1, 5), chooser.randrange(1, 5)
        size = count * factor * chooser.randrange(1, 4)
        for index in range(count):
            segments = _strided([(0, size)], factor, count, index)
            shape, offsets = compute((size,), (count,), [index], [placements._StridedShard(0, split_factor=factor)])
            assert sum(stop - start for start, stop in segments) == shape[0]
            assert segments[0][0] == offsets[0]
