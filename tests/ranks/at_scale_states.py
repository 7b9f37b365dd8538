"""What the ranks of a simulation train: a state that all hold alike (DDP), and one of which each holds its rows (FSDP).

Names, numbers of tensors, dtypes and documents are those of a model with AdamW; the tensors are tiny. One copy serves all ranks: a
replica is the same memory for each of them, a shard a view of its rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from holdfast.checkpoint.arrays import ArraySpec, NumpyAdapter
from holdfast.checkpoint.regions import Rectangle
from holdfast.checkpoint.shares import OWN, REPLICATED, sharded, share_out, staged
from holdfast.checkpoint.tree import FlatTree, Leaf, flatten
from holdfast.train.ranks.sharing import Sharer, _Agreed, _compare, _Contents, _decoded, _fingerprint
from holdfast.train.ranks.together import Together
from holdfast.train.tracked import Tracker

__all__ = ["WRITERS", "Fsdp", "Replicas", "State", "hybrid_payloads"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_GENERATOR_BYTES = 5056
"""What torch's generator saves: every rank's own."""
WRITERS = 8
"""So many ranks write what all have: the least that each of them writes is as small beside 16 MiB as these states are beside one of
128 MiB."""


class State(Protocol):
    """What all ranks hold together. `total_bytes` is what is not any rank's own."""

    kind: str
    total_bytes: int

    def agree(self, together: Together) -> None:
        """This rank's part in finding out who holds what; all ranks call it."""
        ...

    def flat(self, rank: int) -> FlatTree:
        """What `rank` stages."""
        ...

    def change(self) -> None:
        """Every byte is another one."""
        ...

    def wanted(self, rank: int, size: int) -> list[tuple[str, Rectangle | None, bytes]]:
        """What `rank` of `size` reads at a restore, and what it must read."""
        ...


class Replicas:
    """DDP: plain tensors, the same on all ranks; one of them writes each."""

    kind = "ddp"

    def __init__(self, parameters: int, elements: int, size: int) -> None:
        self._model = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(elements)) for _ in range(parameters))
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        for parameter in self._model:
            parameter.grad = torch.randn(elements)
        self._optimizer.step()
        self._tracker = Tracker()
        self._tracker.add({"model": self._model, "optimizer": self._optimizer})
        generator = torch.zeros(_GENERATOR_BYTES, dtype=torch.uint8)
        self._tree = {"tracked": self._tracker.state(), "holdfast": {"generators": generator}}
        self._size = size
        self._flat: dict[int, FlatTree] = {}
        self.total_bytes = sum(leaf.spec.nbytes for leaf in flatten(self._tree["tracked"]).leaves)

    def agree(self, together: Together) -> None:
        ranks = tuple(range(together.size))
        self._flat[together.rank] = Sharer(together, self._tracker).take(self._tree, 1, ranks)

    def flat(self, rank: int) -> FlatTree:
        return self._flat[rank]

    def change(self) -> None:
        with torch.no_grad():
            for tensor in (leaf.value for leaf in flatten(self._tree).leaves):
                tensor.add_(1)

    def wanted(self, rank: int, size: int) -> list[tuple[str, Rectangle | None, bytes]]:
        suffix = f"~r{rank}" if rank and size == self._size else ""
        return [
            (leaf.name if leaf.name.startswith("tracked") else leaf.name + suffix, None, leaf.value.numpy().tobytes())
            for leaf in flatten(self._tree).leaves
        ]


class Fsdp:
    """Every tensor is cut along its rows, as `fully_shard` does; the optimizer's step counters are plain, the same everywhere."""

    kind = "fsdp"

    def __init__(self, parameters: int, rows: int, size: int) -> None:
        rng = np.random.default_rng(0)
        shape = (rows, 4)
        optimizer = {
            number: {moment: rng.random(shape, np.float32) for moment in _MOMENTS} | {"step": np.ones((), np.float32)}
            for number in range(parameters)
        }
        model = {f"layers.{number}.weight": rng.random(shape, np.float32) for number in range(parameters)}
        groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(range(parameters))}]
        self._tree: dict[str, Any] = {
            "tracked": {"model": model, "optimizer": {"state": optimizer, "param_groups": groups}},
            "holdfast": {"generators": np.zeros(_GENERATOR_BYTES, np.uint8)},
        }
        self._size = size
        self._flat: dict[int, FlatTree] = {}
        self.total_bytes = sum(leaf.spec.nbytes for leaf in flatten(self._tree["tracked"]).leaves)

    def payload(self, rank: int) -> bytes:
        """What `rank` says that it has."""
        leaves = self._leaves(rank, self._size)
        contents = _Contents(
            {leaf.name: _fingerprint(leaf) for leaf in leaves if leaf.name.endswith("/step")},
            [(leaf.spec, _fingerprint(leaf)) for leaf in leaves if leaf.value.ndim == 2],
        )
        return msgspec.msgpack.encode(contents)

    def agree(self, together: Together) -> None:
        payload = self.payload(together.rank)
        answer = together.exchange("shares", payload, _compare, what="sharing out the state")
        agreed = msgspec.msgpack.decode(answer, type=_Agreed)
        assert [_decoded(each).tolist() for each in agreed.partitions] == [list(range(self._size))]
        assert len(agreed.replicated) == len(msgspec.msgpack.decode(payload, type=_Contents).plain)

    def flat(self, rank: int) -> FlatTree:
        if rank not in self._flat:
            self._flat[rank] = self._take(rank)
        return self._flat[rank]

    def _take(self, rank: int) -> FlatTree:
        leaves = self._leaves(rank, self._size)
        how = [
            sharded([rank]) if leaf.value.ndim == 2 else REPLICATED if leaf.name.endswith("/step") else OWN
            for leaf in leaves
        ]
        plan = share_out([leaf.spec for leaf in leaves], how, rank=rank, world_size=self._size)
        return staged(FlatTree(self._whole(rank).document, tuple(leaves)), plan)

    def change(self) -> None:
        for leaf in self._whole(0).leaves:
            np.add(leaf.value, 1, out=leaf.value)

    def wanted(self, rank: int, size: int) -> list[tuple[str, Rectangle | None, bytes]]:
        found: list[tuple[str, Rectangle | None, bytes]] = []
        for leaf in self._leaves(rank if size == self._size else 0, size, cut_for=rank):
            is_shard = leaf.value.ndim == 2
            rectangle = Rectangle(leaf.spec.offsets, leaf.spec.shape) if is_shard else None
            if leaf.spec.nbytes:
                found.append((leaf.name, rectangle, leaf.value.tobytes()))
        return found

    def _whole(self, rank: int) -> FlatTree:
        return flatten(self._tree, rank=rank, is_own=lambda path, value: path.startswith("holdfast"))

    def _leaves(self, rank: int, size: int, cut_for: int | None = None) -> list[Leaf]:
        place = rank if cut_for is None else cut_for
        return [_rows(leaf, place, size) if leaf.value.ndim == 2 else leaf for leaf in self._whole(rank).leaves]


def _rows(leaf: Leaf, rank: int, size: int) -> Leaf:
    rows, columns = leaf.spec.global_shape
    most = -(-rows // size)
    start, stop = min(rows, rank * most), min(rows, (rank + 1) * most)
    spec = leaf.spec._replace(shape=(stop - start, columns), offsets=(start, 0))
    return Leaf(leaf.name, leaf.value[start:stop], NumpyAdapter(), spec)


def hybrid_payloads(parameters: int, size: int, shards: int) -> list[bytes]:
    """What every rank says of a state that is sharded over `shards` ranks and replicated over the rest (HSDP)."""
    payloads = []
    for rank in range(size):
        offsets, shape = (rank % shards, 0), (1, 4)
        specs = [
            ArraySpec(f"tracked/{number}/{name}", "f32", shape, (shards, 4), offsets, "torch")
            for number in range(parameters) for name in ("weight", *_MOMENTS)
        ]  # fmt: skip
        payloads.append(msgspec.msgpack.encode(_Contents({}, [(spec, b"12345678") for spec in specs])))
    return payloads
