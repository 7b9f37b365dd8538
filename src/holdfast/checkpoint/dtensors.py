"""torch's sharded tensors (DTensor) as arrays: FSDP2's parameters, tensor-parallel ones, and the optimizer state made like them.

What is stored and restored is the local tensor, plain like any other; this module says where in the global tensor it lies, and
which ranks hold the same part. Nothing here communicates. It is imported only by processes that have imported DTensor themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from holdfast.checkpoint.arrays import ArraySpec, Copy
from holdfast.checkpoint.regions import Rectangle
from holdfast.checkpoint.torch_arrays import TorchAdapter
from holdfast.core.errors import UnsupportedState

try:
    from torch.distributed.tensor import DTensor
except ImportError:
    from torch.distributed._tensor import DTensor  # type: ignore[attr-defined,no-redef,unused-ignore]

__all__ = ["ADAPTER", "DTensorAdapter", "Place", "local_tensor", "sharded_like", "tensor_place"]

_REPLICATE, _SHARD, _STRIDED = "Replicate", "Shard", "_StridedShard"
Segments = list[tuple[int, int]]


class Place(NamedTuple):
    """Where a rank's shard lies, and which global ranks hold the same one."""

    rectangle: Rectangle
    holders: tuple[int, ...]


_places: weakref.WeakKeyDictionary[Any, dict[tuple[object, ...], Place]] = weakref.WeakKeyDictionary()
"""By mesh. A save asks for every tensor, and few of them differ in shape and placements."""


def local_tensor(value: torch.Tensor) -> torch.Tensor:
    """This rank's shard: the memory itself, and only after collectives that still fill it."""
    local: torch.Tensor = value._local_tensor.detach() if isinstance(value, DTensor) else value
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def tensor_place(name: str, value: torch.Tensor) -> Place:
    """Raises UnsupportedState for placements that are no rectangle of the tensor."""
    mesh, placements = value.device_mesh, tuple(value.placements)  # type: ignore[attr-defined]
    known = _places.setdefault(mesh, {})
    key = (tuple(value.shape), placements)
    place = known.get(key)
    if place is None:
        place = known[key] = _place(name, tuple(value.shape), mesh, placements)
    return place


def _place(name: str, shape: tuple[int, ...], mesh: Any, placements: Sequence[Any]) -> Place:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Place(Rectangle(shape, (0,) * len(shape)), ())
    segments: list[Segments] = [[(0, size)] for size in shape]
    among: list[int | slice] = []
    for placement, index, count in zip(placements, coordinate, mesh.mesh.shape, strict=True):
        kind = type(placement).__name__
        if kind == _REPLICATE:
            among.append(slice(None))
            continue
        if kind not in (_SHARD, _STRIDED):
            raise UnsupportedState(
                f"{name or 'the state'}: a DTensor placed as {placement} cannot be stored; redistribute it to Replicate() or "
                "Shard() before it is saved" + (" (Partial values are not summed up yet)" if "Partial" in kind else "")
            )
        cut = segments[placement.dim]
        if kind == _STRIDED:
            segments[placement.dim] = _strided(cut, int(placement.split_factor), count, index)
        else:
            segments[placement.dim] = _chunk(cut, count, index)
        among.append(index)
    rectangle = _rectangle(name, shape, segments, placements)
    return Place(rectangle, tuple(sorted(mesh.mesh[tuple(among)].flatten().tolist())))


def _chunk(segments: Segments, count: int, index: int) -> Segments:
    """The piece that `torch.chunk` gives to `index`, of what the segments hold one after the other."""
    size = sum(stop - start for start, stop in segments)
    most = -(-size // count)
    first, last = min(size, most * index), min(size, most * (index + 1))
    found, position = [], 0
    for start, stop in segments:
        a, b = max(first, position), min(last, position + stop - start)
        if a < b:
            found.append((start + a - position, start + b - position))
        position += stop - start
    return found


def _strided(segments: Segments, split_factor: int, count: int, index: int) -> Segments:
    """FSDP over tensor parallelism on one dimension: the latter has cut first, and of each of its pieces `index` takes its own."""
    return [
        segment
        for piece in range(split_factor)
        for segment in _chunk(_chunk(segments, split_factor, piece), count, index)
    ]


def _rectangle(name: str, shape: tuple[int, ...], segments: Sequence[Segments], placements: Sequence[Any]) -> Rectangle:
    offsets, sizes = [], []
    for size, cut in zip(shape, segments, strict=True):
        start, stop = (cut[0][0], cut[-1][1]) if cut else (size, size)
        if sum(b - a for a, b in cut) != stop - start:
            raise UnsupportedState(
                f"{name or 'the state'}: a DTensor of shape {list(shape)} placed as {list(placements)} is not one rectangle on "
                "this rank and cannot be stored; shard it along another dimension"
            )
        offsets.append(start)
        sizes.append(stop - start)
    return Rectangle(tuple(offsets), tuple(sizes))


def sharded_like(template: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor with the mesh and the placements of `template` around a shard of this rank, which may lie in host memory."""
    like: torch.Tensor = DTensor.from_local(
        local.to(local_tensor(template).device),
        template.device_mesh,  # type: ignore[attr-defined]
        template.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )
    return like


class DTensorAdapter(TorchAdapter):
    """Sharded tensors. Copies, addresses and bytes are those of the local tensor."""

    def recognises(self, value: object) -> bool:
        return isinstance(value, DTensor)

    def spec(self, name: str, value: torch.Tensor) -> ArraySpec:
        local = super().spec(name, local_tensor(value))
        rectangle = tensor_place(name, value).rectangle
        if local.shape != rectangle.shape and (local.nbytes or rectangle.size):
            raise UnsupportedState(
                f"{name or 'the state'}: this rank's shard of a DTensor has the shape {list(local.shape)}, where its placements "
                f"say {list(rectangle.shape)}; it cannot be stored"
            )
        return local._replace(shape=rectangle.shape, global_shape=tuple(value.shape), offsets=rectangle.offsets)

    def address(self, value: torch.Tensor) -> int:
        return super().address(local_tensor(value))

    def identity(self, value: torch.Tensor) -> tuple[object, ...]:
        seen_as = (tuple(value.shape), tuple(value.placements))  # type: ignore[attr-defined]
        local = local_tensor(value)
        if local.numel() == 0:
            return (self.library, id(value), seen_as)
        return (*super().identity(local), seen_as)

    def pin(self, values: Sequence[torch.Tensor], address: int, size_bytes: int) -> Callable[[], None] | None:
        return super().pin([local_tensor(value) for value in values], address, size_bytes)

    def copy(self, values: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], deferrable: Sequence[bool]) -> Copy:
        # An empty shard may be told as (0, 5) here and as (0,) there; it has nothing to copy.
        pairs = [
            (local, target, later)
            for value, target, later in zip(values, targets, deferrable, strict=True)
            if (local := local_tensor(value)).numel()
        ]
        return super().copy([pair[0] for pair in pairs], [pair[1] for pair in pairs], [pair[2] for pair in pairs])

    def stream(self, value: torch.Tensor, start_byte: int, length: int) -> memoryview:
        return super().stream(local_tensor(value), start_byte, length)

    def writable(self, value: torch.Tensor) -> memoryview | None:
        return super().writable(local_tensor(value))

    @torch.no_grad()
    def assign(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """`source` is this rank's shard, another tensor that is sharded alike, or the whole tensor."""
        local, given = local_tensor(target), local_tensor(source)
        if local.numel() == 0:
            return
        if not isinstance(source, DTensor) and given.shape != local.shape and given.shape == target.shape:
            given = given[tensor_place("", target).rectangle.slices()]
        local.copy_(given)

    def rows(self, value: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        raise UnsupportedState("a shard is written as it is, never in rows")

    def holders(self, value: torch.Tensor) -> tuple[int, ...] | None:
        return tensor_place("", value).holders


ADAPTER = DTensorAdapter()
