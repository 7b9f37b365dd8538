"""Ranks for the tests: processes under gloo, models sharded in every way, and the two ways over a checkpoint.

The process that forks the ranks of jobs (job.py) forks these as well: see `run` and resharding_scenarios.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forking import Zygote
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from waiting import eventually

from holdfast.checkpoint.arrays import adapter_for
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.read import CheckpointReader, open_checkpoint
from holdfast.checkpoint.shares import OWN, REPLICATED, Sharing, agree_on_shards, sharded, share_out, staged
from holdfast.checkpoint.snapshot import lay_out, stage
from holdfast.checkpoint.staging import Slot
from holdfast.checkpoint.tree import FlatTree, Leaf, flatten
from holdfast.checkpoint.write import put_root, write_part
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.train.restoring import Loaded, load_checkpoint
from holdfast.train.tracked import Tracker

GIVE_UP_S = 240.0
KINDS = ("plain", "fsdp", "hsdp", "fsdp+tp", "tp")
"""Each rank all of it; FSDP2; FSDP2 of two replicas; FSDP2 over tensor-parallel; tensor-parallel alone."""


class Net(nn.Module):
    """Shapes that four ranks cannot divide, one that leaves a rank without anything, bf16, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.odd, self.tiny = nn.Linear(5, 7), nn.Linear(7, 3)
        self.large = nn.Linear(300, 700)
        self.narrow = nn.Linear(4, 5, dtype=torch.bfloat16)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x[:, :6]))).sum() + self.tiny(self.odd(x[:, :5])).pow(2).sum()
        return y + self.large(x).pow(2).mean() + self.narrow(x[:, :4].bfloat16()).float().pow(2).sum()


def make(kind: str, meshes: dict[str, DeviceMesh], *, seed: int, on_meta: bool = False) -> Net:
    """A model of one kind. The same seed makes the same global values."""
    torch.manual_seed(seed)
    with torch.device("meta" if on_meta else "cpu"):
        model = Net()
    if kind in ("tp", "fsdp+tp"):
        mesh = meshes["tp"] if kind == "tp" else meshes["2d"]["tp"]
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind in ("fsdp", "hsdp", "fsdp+tp"):
        mesh = {"fsdp": meshes["1d"], "hsdp": meshes.get("2d"), "fsdp+tp": None}[kind] or meshes["2d"]["dp"]
        fully_shard(model.narrow, mesh=mesh)
        fully_shard(model.large, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
    if on_meta:
        model.to_empty(device="cpu")
    return model


def meshes_of(ranks: list[int]) -> dict[str, DeviceMesh]:
    """Called by all ranks of the job, members or not."""
    made = {
        "1d": DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)),
        "tp": DeviceMesh("cpu", ranks, mesh_dim_names=("tp",)),
    }
    if len(ranks) % 2 == 0:
        halves = torch.tensor(ranks).reshape(-1, 2)
        made["2d"] = DeviceMesh("cpu", halves, mesh_dim_names=("dp", "tp"))
    return made


def optimizer_for(model: nn.Module, flavour: str, *, reverse: bool = False) -> torch.optim.AdamW:
    """Two groups, so that weights and biases decay differently. `reverse`: the parameters in another order."""
    named = list(model.named_parameters())
    # torch takes sharded tensors and others together only where it steps one by one.
    is_mixed = len({type(parameter) for _, parameter in named}) > 1
    if reverse:
        named.reverse()
    weights = [p for name, p in named if name.endswith("weight")]
    biases = [p for name, p in named if not name.endswith("weight")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, **{"foreach" if is_mixed else flavour: not is_mixed})  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.rand(4, 300)).backward()
        for name, parameter in model.named_parameters():
            # A parameter that has never had a gradient has no state.
            if name == "tiny.bias":
                parameter.grad = None
        optimizer.step()


def tracker_of(model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> Tracker:
    tracker = Tracker()
    tracker.add({"model": model, "optimizer": optimizer, "extra": extra})
    return tracker


def tree_of(tracker: Tracker) -> dict[str, Any]:
    return {"tracked": tracker.state(), "holdfast": {"position": {"step": 2}, "parameters": tracker.parameters()}}


def is_own(path: str, value: Any) -> bool:
    return not path.startswith(("tracked/model/", "tracked/optimizer/")) or path == "tracked/model/seen"


def _sharing(leaf: Leaf, holders: dict[str, tuple[int, ...]]) -> Sharing:
    if leaf.name in holders:
        assert set(leaf.adapter.holders(leaf.value) or ()) <= set(holders[leaf.name]) or not leaf.spec.nbytes
        return sharded(holders[leaf.name])
    return OWN if is_own(leaf.name.partition("~r")[0], leaf.value) else REPLICATED


def write(store: Store, tracker: Tracker, name: str, rank: int, world_size: int) -> tuple[CheckpointRef, FlatTree]:
    """What the ranks do together, without the protocol of a commit. Collective."""
    flat = flatten(tree_of(tracker), rank=rank, is_own=is_own)
    everybody: list[Any] = [None] * world_size
    mine_of = {leaf.spec: b"" for leaf in flat.leaves if leaf.adapter.holders(leaf.value) is not None}
    dist.all_gather_object(everybody, mine_of)
    holders = agree_on_shards(everybody)[rank]
    sharing = [_sharing(leaf, holders) for leaf in flat.leaves]
    plan = share_out([leaf.spec for leaf in flat.leaves], sharing, rank=rank, world_size=world_size)
    mine = staged(flat, plan)
    layout = lay_out(mine)
    slot = Slot(max(1, layout.total_bytes))
    snapshot = stage(mine, layout, slot, step=2, epoch=0, metadata={}, deferrable=None)
    with ThreadPoolExecutor(2) as pool:
        part, _ = write_part(
            snapshot, store, name=name, rank=rank, attempt=1, known=KnownChunks(), hashing=pool, sending=pool,
            tokens=seeded_tokens(abs(hash((name, rank)))), uploaded=set(),
        )  # fmt: skip
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, part)
    found: list[Any] = [None]
    if rank == 0:
        _, root_blake3 = put_root(store, "run", name, parts, {})
        found[0] = CheckpointRef(
            name=name, root_blake3=root_blake3, step=2, epoch=0, generation=1, attempt=1, unix_s=0.0,
            total_bytes=sum(part.total_bytes for part in parts),
        )  # fmt: skip
    dist.broadcast_object_list(found, src=0)
    return found[0], flat


def reader_of(store: Store, ref: CheckpointRef) -> CheckpointReader:
    return open_checkpoint(store, ref, lambda url: LocalStore(Path(url)))


def restore(reader: CheckpointReader, tracker: Tracker, rank: int, world_size: int) -> Loaded:
    with ThreadPoolExecutor(2) as pool:
        return load_checkpoint(reader, tracker, pool, strict=True, rank=rank, world_size=world_size)


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and their state, by name."""
    found = dict(model.named_parameters())
    for name, parameter in list(found.items()):
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = value
    return found


def whole_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Of all ranks together. Collective."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in values(model, optimizer).items()
    }


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    """Each rank its own part, bit by bit."""
    assert found.keys() == expected.keys(), f"{what}: {found.keys() ^ expected.keys()}"
    for name, value in found.items():
        adapter = adapter_for(value)
        assert adapter is not None
        spec = adapter.spec(name, value)
        local = value.to_local() if hasattr(value, "to_local") else value
        part = expected[name][tuple(slice(a, a + n) for a, n in zip(spec.offsets, spec.shape, strict=True))]
        assert value.dtype == part.dtype, f"{what}: {name} is {value.dtype}"
        assert spec.global_shape == tuple(expected[name].shape), f"{what}: {name} has the shape {spec.global_shape}"
        assert torch.equal(local.detach().reshape(part.shape), part), f"{what}: {name} differs"


def run(zygote: Zygote, scenario: str, folder: Path, world_size: int) -> None:
    """Run scenarios (of resharding_scenarios.py, joined by commas) on so many ranks; raises with what the first of them that failed
    has said."""
    group = folder / f"group-{scenario}-{world_size}"
    logs = [Path(f"{group}.log-{rank}") for rank in range(world_size)]
    told = {"scenario": scenario, "folder": str(folder), "world_size": world_size, "group": str(group)}
    pids = [zygote.start({**told, "rank": rank}, {}, log) for rank, log in enumerate(logs)]
    try:
        eventually(
            lambda: all(_ended(pid) for pid in pids),
            lambda: f"{scenario} on {world_size} ranks hangs",
            give_up_s=GIVE_UP_S,
        )
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes = [zygote.wait(pid) for pid in pids]
    failed = [(rank, log.read_text()) for rank, (code, log) in enumerate(zip(codes, logs, strict=True)) if code]
    # The one that failed first has the shortest story: the others say that a peer is gone.
    for rank, text in sorted(failed, key=lambda item: "Connection" in item[1]):
        raise AssertionError(f"rank {rank} of {world_size}:\n{text[-6000:]}")


def _ended(pid: int) -> bool:
    """It stays a zombie until it is waited for."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def main(scenario: str, folder: str, rank: int, world_size: int, group: str) -> None:
    """A rank of it."""
    import resharding_scenarios

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=world_size)
    for name in scenario.split(","):
        work: Callable[[Path, int, int], None] = getattr(resharding_scenarios, name)
        work(Path(folder), rank, world_size)
        dist.barrier()
    dist.destroy_process_group()
