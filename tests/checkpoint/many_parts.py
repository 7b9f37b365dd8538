"""Checkpoints of several ranks, made of numpy arrays cut into rectangles, without processes and without a commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from holdfast.checkpoint import format as format_module
from holdfast.checkpoint import read, targets
from holdfast.checkpoint import write as write_module
from holdfast.checkpoint.arrays import NumpyAdapter
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.read import CheckpointReader, open_checkpoint
from holdfast.checkpoint.regions import Rectangle
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tree import FlatTree, Leaf, flatten
from holdfast.checkpoint.write import WrittenPart, put_root, write_part
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store

NAME = "checkpoints/00000002-1-abc"
Pieces = Mapping[str, Sequence[tuple[np.ndarray[Any, Any], Rectangle]]]
"""By array, the rectangles of it (of the whole array, which is given each time) that one rank writes."""


def tree_of(pieces: Pieces) -> FlatTree:
    """What a rank with these pieces stages. Its document names the arrays."""
    leaves = []
    for name, rectangles in pieces.items():
        for whole, rectangle in rectangles:
            held = np.ascontiguousarray(whole[rectangle.slices()])
            spec = NumpyAdapter().spec(name, held)
            spec = spec._replace(shape=rectangle.shape, global_shape=whole.shape, offsets=rectangle.offsets)
            leaves.append(Leaf(name, held.reshape(rectangle.shape), NumpyAdapter(), spec))
    document = flatten(dict.fromkeys(pieces)).document
    return FlatTree(document, tuple(leaves))


def write(
    store: Store, trees: Sequence[FlatTree], *, known: KnownChunks | None = None, name: str = NAME, seed: int = 0
) -> tuple[CheckpointRef, list[WrittenPart]]:
    """One part for each tree, the root, and what a head would say of it."""
    written = []
    with ThreadPoolExecutor(2) as pool:
        for rank, flat in enumerate(trees):
            snapshot = stream(flat, lay_out(flat), step=1, epoch=0, metadata={})
            part, _ = write_part(
                snapshot, store, name=name, rank=rank, attempt=1, known=known or KnownChunks(),
                tokens=seeded_tokens(100 * seed + rank), hashing=pool, sending=pool, uploaded=set(),
            )  # fmt: skip
            written.append(part)
    _, root_blake3 = put_root(store, "run", name, written, {})
    return ref_to(written, root_blake3, name), written


def ref_to(written: Iterable[WrittenPart], root_blake3: str, name: str = NAME) -> CheckpointRef:
    return CheckpointRef(
        name=name, root_blake3=root_blake3, step=1, epoch=0, generation=1, attempt=1, unix_s=0.0,
        total_bytes=sum(part.total_bytes for part in written),
    )  # fmt: skip


def opened(store: Store, ref: CheckpointRef) -> CheckpointReader:
    def no_home(url: str) -> Store:
        raise AssertionError(url)

    return open_checkpoint(store, ref, no_home)


@contextmanager
def small_blocks(block_bytes: int = 16, chunk_bytes: int = 48, span_bytes: int = 32) -> Iterator[None]:
    """Blocks, chunks and spans so small that an array of some elements has many."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (format_module, write_module, targets, read):
            patch.setattr(module, "BLOCK_BYTES", block_bytes)
        for module in (format_module, write_module):
            patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(targets, "SPAN_BYTES", span_bytes)
        patch.setattr(read, "_SMALL_BYTES", block_bytes)
        yield


class Counting:
    """A store that counts the bytes that are read from data objects."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.ranges: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.ranges.append((key, offset, len(buffer)))
        self._inner.read_into(key, offset, buffer)
