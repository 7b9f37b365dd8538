"""What the processes of `resharding.run` do, each rank the same."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from resharding import (
    KINDS,
    check,
    make,
    meshes_of,
    optimizer_for,
    reader_of,
    restore,
    tracker_of,
    train,
    values,
    whole_values,
    write,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from holdfast.checkpoint.arrays import adapter_for
from holdfast.checkpoint.tree import flatten
from holdfast.core.errors import UnsupportedState
from holdfast.store.local import LocalStore


def write_all(folder: Path, rank: int, world_size: int) -> None:
    """A checkpoint of every kind, and what its tensors are as wholes."""
    store, meshes, made = LocalStore(folder / "run"), meshes_of(list(range(world_size))), {}
    for number, kind in enumerate(KINDS):
        if ("2d" not in meshes and kind in ("hsdp", "fsdp+tp")) or (kind == "tp" and 8 % world_size):
            continue
        model = make(kind, meshes, seed=1)
        optimizer = optimizer_for(model, "fused" if kind == "fsdp" else "foreach")
        train(model, optimizer)
        model.seen.fill_(rank)
        extra = {"rank": torch.tensor([rank]), "list": [rank] * rank}
        name = f"checkpoints/0000000{number + 2}-1-{kind.replace('+', '')}"
        ref, _ = write(store, tracker_of(model, optimizer, extra), name, rank, world_size)
        made[kind] = (ref, whole_values(model, optimizer))
    if rank == 0:
        (folder / "made").write_bytes(pickle.dumps((world_size, made)))


def read_all(folder: Path, rank: int, world_size: int) -> None:
    """Each of those checkpoints, restored into every kind of model, on all of these ranks and on fewer."""
    written_by, made = pickle.loads((folder / "made").read_bytes())
    store = LocalStore(folder / "run")
    sizes = sorted({world_size, *((3, 2, 1) if world_size == 4 else ())}, reverse=True)
    worlds = {size: meshes_of(list(range(size))) for size in sizes}
    for size, meshes in worlds.items():
        for kind in [*KINDS, "meta"] if size == world_size else ["fsdp", "plain"]:
            is_2d = kind in ("hsdp", "fsdp+tp")
            for number, (source, (ref, expected)) in enumerate(made.items()):
                if rank >= size or (is_2d and "2d" not in meshes):
                    continue
                model = make("fsdp" if kind == "meta" else kind, meshes, seed=2 + rank, on_meta=kind == "meta")
                # The order of the parameters is another one each second time.
                optimizer = optimizer_for(model, "fused" if kind == "hsdp" else "foreach", reverse=bool(number % 2))
                extra: dict[str, Any] = {"rank": torch.tensor([-1]), "list": [-1]}
                restore(reader_of(store, ref), tracker_of(model, optimizer, extra), rank, size)
                check(values(model, optimizer), expected, f"{source} on {written_by} → {kind} on {size}")
                mine = rank if size == written_by else 0
                assert extra == {"rank": torch.tensor([mine]), "list": [mine] * mine}
                assert model.seen.tolist() == [mine] * 3
                assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def restored_goes_on(folder: Path, rank: int, world_size: int) -> None:
    """After a restore the steps are those of a process that never stopped, in every kind of model."""
    store, meshes = LocalStore(folder / "on"), meshes_of(list(range(world_size)))
    for kind in KINDS:
        if ("2d" not in meshes and kind in ("hsdp", "fsdp+tp")) or (kind == "tp" and 8 % world_size):
            continue
        model = make(kind, meshes, seed=1)
        optimizer = optimizer_for(model, "foreach")
        train(model, optimizer)
        name = f"checkpoints/00000002-1-{kind.replace('+', '')}"
        ref, _ = write(store, tracker_of(model, optimizer, {}), name, rank, world_size)
        other = make(kind, meshes, seed=5)
        # It has trained before, so that what is there must be replaced.
        again = optimizer_for(other, "foreach", reverse=True)
        train(other, again, steps=1)
        restore(reader_of(store, ref), tracker_of(other, again, {}), rank, world_size)
        train(model, optimizer)
        train(other, again)
        check(values(other, again), whole_values(model, optimizer), kind)


def places(folder: Path, rank: int, world_size: int) -> None:
    """Where shards lie and who holds them, for every way to place a tensor, as the tensor itself says."""
    meshes = meshes_of(list(range(world_size)))
    generator = torch.Generator().manual_seed(0)
    for shape in ((7, 5), (4, 4), (1, 9), (8, 3, 5), (3,), (0, 3)):
        whole = torch.rand(shape, generator=generator)
        ways = [("1d", [placement]) for placement in (Replicate(), *map(Shard, range(len(shape))))]
        if "2d" in meshes:
            each = [Replicate(), *map(Shard, range(len(shape)))]
            ways += [("2d", [one, other]) for one in each for other in each]
        for mesh, placement in ways:
            tensor = distribute_tensor(whole, meshes[mesh], placement)
            adapter = adapter_for(tensor)
            assert adapter is not None
            spec, holders = adapter.spec("x", tensor), adapter.holders(tensor)
            part = whole[tuple(slice(a, a + n) for a, n in zip(spec.offsets, spec.shape, strict=True))]
            assert torch.equal(tensor.to_local().reshape(part.shape), part)
            everybody: list[Any] = [None] * world_size
            dist.all_gather_object(everybody, (spec.offsets, spec.shape))
            alike = [other for other, theirs in enumerate(everybody) if theirs == everybody[rank]]
            assert holders is not None
            assert rank in holders
            # Shards without elements look alike wherever they come from.
            assert set(holders) <= set(alike)
            assert not part.numel() or list(holders) == alike


def strange(folder: Path, rank: int, world_size: int) -> None:
    """What cannot be stored is refused by name; what looks strange and can be, is."""
    meshes = meshes_of(list(range(world_size)))
    partial = DTensor.from_local(torch.ones(3), meshes["1d"], [Partial()], run_check=False)
    with pytest.raises(UnsupportedState, match=r"model/x: a DTensor placed as .*Partial"):
        flatten({"model": {"x": partial}})
    complex_half = DTensor.from_local(torch.ones(3, dtype=torch.complex32), meshes["1d"], [Shard(0)], run_check=False)
    with pytest.raises(UnsupportedState, match="model/x"):
        flatten({"model": {"x": complex_half}})
    # A result that is still on its way is waited for, and tied tensors are one.
    sharded = distribute_tensor(torch.arange(8.0), meshes["1d"], [Shard(0)])
    coming = sharded.redistribute(placements=[Replicate()], async_op=True)
    flat = flatten({"a": coming, "b": sharded, "c": sharded.detach(), "d": sharded.to_local()})
    assert [leaf.name for leaf in flat.leaves][:2] == ["a", "b"]
    adapter = adapter_for(coming)
    assert adapter is not None
    assert bytes(adapter.stream(coming, 0, 32)) == torch.arange(8.0).numpy().tobytes()
    assert "c" not in [leaf.name for leaf in flat.leaves]
