"""A small training of several ranks that can be killed at any place. As a program it forks them, and those of resharding.py
(tests/support/forking.py)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "support"))

from forking import serve

import holdfast
from holdfast.checkpoint import joint, shares
from holdfast.core.contract import ENV_CONTROL
from holdfast.core.errors import PermissionDenied
from holdfast.store.base import Body
from holdfast.store.local import LocalStore
from holdfast.train import base as bases
from holdfast.train.ranks.together import Together
from holdfast.train.saves import Saves

SAMPLES, BATCH, EPOCHS, WIDTH = 72, 4, 3, 16
PLACES = {
    "begin": (joint.JointCommitter, "_write", "before"),
    "own part": (joint, "write_part", "after"),
    "gathered": (Together, "gather", "after"),
    "root": (joint, "put_root", "after"),
    "head": (joint.JointCommitter, "_publish", "after"),
    "told": (Together, "done", "after"),
    "asked to begin": (Together, "next_begin", "after"),
    "handed in": (Together, "hand_in", "after"),
    "outcome": (Together, "outcome", "after"),
    "leaving": (Saves, "leave_with_live", "before"),
}
"""Where a rank can be made to die: around these calls of a save."""


def die_at(place: str, number: int) -> None:
    """SIGKILL, the `number`-th time that the place is reached."""
    owner, name, when = PLACES[place]
    whole: Callable[..., Any] = getattr(owner, name)
    count = 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if when == "before" and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*arguments, **named)
        if when == "after" and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def block_writes(block: Path) -> None:
    whole = LocalStore.put

    def put(self: LocalStore, key: str, body: Body) -> None:
        while key.startswith("data/") and block.exists():
            time.sleep(0.005)
        whole(self, key, body)

    LocalStore.put = put  # type: ignore[method-assign]


def refused(*arguments: Any) -> NoReturn:
    raise PermissionDenied("not for this rank")


def note_reads(notes: Path) -> None:
    whole = LocalStore.read_into

    def read_into(self: LocalStore, key: str, offset: int, buffer: memoryview) -> None:
        with notes.open("a") as file:
            file.write(f"{key} {len(buffer)} {self.root}\n")
        whole(self, key, offset, buffer)

    LocalStore.read_into = read_into  # type: ignore[method-assign]
    LocalStore.is_near = False  # type: ignore[assignment, method-assign]


def digest(value: Any) -> str:
    sha = hashlib.sha256()

    def walk(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            local = node.to_local() if hasattr(node, "to_local") else node
            sha.update(local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, dict):
            for key in node:
                sha.update(repr(key).encode())
                walk(node[key])
        elif isinstance(node, list | tuple):
            for item in node:
                walk(item)
        else:
            sha.update(repr(node).encode())

    walk(value)
    return sha.hexdigest()


def build(kind: str, *, frozen: bool = False) -> tuple[nn.Module, nn.Module]:
    """The plain module, and how it is trained. `frozen`: without its first layer."""
    torch.manual_seed(7)
    layers: list[nn.Module] = [nn.Linear(WIDTH, 40), nn.Dropout(0.1), nn.Linear(40, 6), nn.LayerNorm(6)]
    layers[0].requires_grad_(not frozen)
    if kind == "ddp":
        plain = nn.Sequential(*layers, nn.BatchNorm1d(6), nn.Linear(6, 4))
        return plain, nn.parallel.DistributedDataParallel(plain)
    plain = nn.Sequential(*layers, nn.Linear(6, 4))
    size = dist.get_world_size()
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    fully_shard(plain[0], mesh=mesh)
    fully_shard(plain, mesh=mesh)
    return plain, plain


def train(
    url: str,
    kind: str = "ddp",
    pace_s: float = 0.0,
    save_every: Any = "3 steps",
    notice: str = "none",
    commit_timeout: float = 20.0,
    global_batch: int | None = None,
    place: str = "",
    at: int = 1,
    result: str = "",
    control: str = "",
    late_s: float = 0.0,
    fresh: bool = False,
    far: bool = False,
    frozen: bool = False,
    base: str | None = None,
    blind: bool = False,
) -> None:
    """`place`, `at`: this rank dies there, the `at`-th time. `result`: where what came out is written, with the rank at its end.
    `control`: the folder of the agent that watches over this rank. Data is not written while there is a file `<url>.block`.
    `far`: as though the store lay behind a network; what is read, and of which folder, is noted in `<url>.reads-<rank>`.
    `blind`: this rank may not read the base."""
    if blind:
        bases.open_checkpoint = refused
    if control:
        os.environ[ENV_CONTROL] = control
    block_writes(Path(f"{url}.block"))
    if place:
        die_at(place, at)
    rank = dist.get_rank()
    if far:
        note_reads(Path(f"{url}.reads-{rank}"))
    module, model = build(kind, frozen=frozen)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-2)
    inputs = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.arange(SAMPLES),
        torch.randn(SAMPLES, WIDTH, generator=inputs),
        torch.randint(4, (SAMPLES,), generator=inputs),
    )
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    torch.manual_seed(100 + rank)
    record: dict[str, Any] = {"seen": []}
    page, samples = Path(f"{url}.step-{rank}"), Path(f"{url}.samples-{rank}")
    with holdfast.Run(
        url,
        save_every=save_every,
        keep=2,
        notice=notice,
        commit_timeout=commit_timeout,
        seed=3,
        progress=False,
        fresh=fresh,
        base=base,
    ) as run:
        run.track(model=model, optimizer=optimizer, record=record)
        for epoch in run.epochs(EPOCHS):
            for index, x, y in run.batches(loader, global_batch=global_batch):
                with run.accumulating(model):
                    loss = nn.functional.cross_entropy(model(x), y) * run.micro.weight
                    loss.backward()
                if run.micro.last:
                    optimizer.step()
                    optimizer.zero_grad()
                if run.micro.weight:
                    record["seen"].extend([epoch, number] for number in index.tolist())
                    with samples.open("a") as file:
                        file.writelines(f"{epoch} {number}\n" for number in index.tolist())
                run.log(loss=loss)
                time.sleep(pace_s)
                page.write_text(str(run.step + run.micro.last))
            time.sleep(late_s)
            with run.evaluating():
                time.sleep(pace_s)
        steps = run.step
    outcome = {
        "steps": steps,
        "digest": digest([module.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state()]),
        "seen": record["seen"],
    }
    Path(f"{result}.{rank}").write_text(json.dumps(outcome))


def main(**arguments: Any) -> None:
    if "scenario" in arguments:
        import resharding

        resharding.main(**arguments)
        return
    # Small states are shared out as large ones are.
    shares.LEAST_STRETCH_BYTES = 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(**arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    import resharding_scenarios  # noqa: F401  # before it is forked

    serve(main)
