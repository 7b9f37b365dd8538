"""Small trainings that are awkward to save, and a driver that interrupts them; shared by the tests of `holdfast.Run`."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
import hashlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import read_truth
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore

WIDTH, SAMPLES, BATCH = 6, 28, 4
"""Seven batches per epoch: no multiple of any accumulation below."""


class Killed(Exception):
    """Stands for the end of the process: it leaves the run in the middle of a step, and no checkpoint may come of it."""


@dataclass
class Stores:
    """Opens one store for every URL, the same over all attempts."""

    make: Callable[[], Store] = MemoryStore
    by_url: dict[str, Store] = field(default_factory=dict)

    def __call__(self, url: str, *, options: Mapping[str, str] | None = None) -> Store:
        return self.by_url.setdefault(url, self.make())

    def only(self) -> Store:
        (store,) = self.by_url.values()
        return store

    def checkpoints(self) -> list[CheckpointRef]:
        head = read_truth(self.only()).head
        return [] if head is None else head.checkpoints


def seeded(seed: int = 7) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def digest(value: Any) -> str:
    """A hash of a state tree: every byte of every array, and every plain value."""
    sha = hashlib.sha256()

    def walk(node: Any) -> None:
        if isinstance(node, Tensor):
            sha.update(f"{node.dtype}{tuple(node.shape)}".encode())
            sha.update(node.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, np.ndarray):
            sha.update(f"{node.dtype}{node.shape}".encode() + node.tobytes())
        elif isinstance(node, dict):
            for key in node:
                sha.update(repr(key).encode())
                walk(node[key])
        elif isinstance(node, list | tuple):
            sha.update(b"[")
            for item in node:
                walk(item)
        else:
            sha.update(repr(node).encode())

    walk(value)
    return sha.hexdigest()


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=BATCH, shuffle=True)


@dataclass
class Training:
    """Objects to track, and a step. `evaluate` runs after each epoch."""

    tracked: dict[str, Any]
    step: Callable[[holdfast.Run, Tensor, Tensor], None]
    evaluate: Callable[[holdfast.Run], None] = lambda run: None

    def result(self) -> str:
        states = [
            value.state_dict()
            if hasattr(value, "state_dict")
            else value.get_state()
            if hasattr(value, "get_state")
            else value
            for value in self.tracked.values()
        ]
        return digest([states, torch.get_rng_state(), list(random.getstate()), np.random.get_state(legacy=False)])


def net() -> nn.Sequential:
    """BatchNorm, dropout, tied weights and a frozen part."""
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    tied = nn.Linear(WIDTH, WIDTH, bias=False)
    again = nn.Linear(WIDTH, WIDTH, bias=False)
    again.weight = tied.weight
    return nn.Sequential(frozen, nn.BatchNorm1d(WIDTH), tied, nn.Dropout(0.2), again, nn.Tanh(), nn.Linear(WIDTH, 1))


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x + 0.01 * torch.randn_like(x) + random.random() * 0.01), y)


def plain(**options: Any) -> Training:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        scheduler.step()

    return Training({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step)


def gan(d_every: int = 1, g_every: int = 3) -> Training:
    """Two optimizers with different rhythms. The generator's loss leaves gradients in the discriminator."""
    g, d = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))
    opt_g, opt_d = torch.optim.Adam(g.parameters(), 1e-2), torch.optim.RMSprop(d.parameters(), 1e-2, momentum=0.5)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        fake = g(torch.randn_like(x))
        if run.step % d_every == 0:
            opt_d.zero_grad()
            (d(x).mean() - d(fake.detach()).mean()).backward()
            opt_d.step()
        if run.step % g_every == 0:
            opt_g.zero_grad()
            d(fake).mean().backward()
            opt_g.step()

    return Training({"g": g, "d": d, "opt_g": opt_g, "opt_d": opt_d}, step)


def accumulating(every: int = 3) -> Training:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        (loss_of(model, x, y) / every).backward()
        if run.step % every == every - 1:
            optimizer.step()
            optimizer.zero_grad()

    return Training({"model": model, "optimizer": optimizer}, step)


def scaled(enabled: bool = True) -> Training:
    """GradScaler, with an overflow in every fifth step: that step is skipped and the scale halved."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled, growth_interval=3)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        if run.step % 5 == 4:
            loss = loss * float("inf") if enabled else loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return Training({"model": model, "optimizer": optimizer, "scaler": scaler}, step)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is commonly written: never stepped itself, steps through another optimizer."""

    def __init__(self, parameters: Any, rho: float, lr: float) -> None:
        super().__init__(parameters, {"rho": rho, "lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @torch.no_grad()
    def ascend(self) -> list[Tensor]:
        moves = []
        for parameter in self.param_groups[0]["params"]:
            move = parameter.grad * self.param_groups[0]["rho"] if parameter.grad is not None else torch.zeros(())
            parameter.add_(move)
            moves.append(move)
        self.zero_grad()
        return moves

    @torch.no_grad()
    def descend(self, moves: list[Tensor]) -> None:
        for parameter, move in zip(self.param_groups[0]["params"], moves, strict=True):
            parameter.sub_(move)
        self.base_optimizer.step()

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups
        self.base_optimizer.state = self.state


def sharpness_aware() -> Training:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.05, lr=1e-2)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()  # at the beginning: gradients are left over at every boundary
        loss_of(model, x, y).backward()
        with run.mutating():
            moves = optimizer.ascend()
            run.save()
            loss_of(model, x, y).backward()
            optimizer.descend(moves)

    return Training({"model": model, "optimizer": optimizer}, step)


def averaged() -> Training:
    """An EMA that is swapped in for the evaluation, and a record of its scores."""
    model = net()
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    record: dict[str, Any] = {"scores": [], "history": np.zeros(40)}

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        record["history"][run.step] = loss.item()

    def evaluate(run: holdfast.Run) -> None:
        with run.evaluating(), run.mutating():
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(ema.module.state_dict())
            run.save()
            record["scores"].append(loss_of(model, torch.ones(2, WIDTH), torch.ones(2, 1)).item())
            model.load_state_dict(kept)

    return Training({"model": model, "ema": ema, "optimizer": optimizer, "record": record}, step, evaluate)


class HighPrecisionSGD(torch.optim.Optimizer):
    """Keeps fp32 momentum for bf16 parameters."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("momentum", torch.zeros_like(parameter, dtype=torch.float32))
            state["momentum"].mul_(0.9).add_(parameter.grad.float())
            parameter.sub_((self.param_groups[0]["lr"] * state["momentum"]).to(parameter.dtype))


def low_precision() -> Training:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).bfloat16()
    optimizer = HighPrecisionSGD(model.parameters(), lr=1e-1)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x.bfloat16(), y.bfloat16()).backward()
        optimizer.step()

    return Training({"model": model, "optimizer": optimizer}, step)


def channels_last() -> Training:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 1))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x.repeat(1, 9)[:, :50].reshape(-1, 2, 5, 5), y).backward()
        optimizer.step()

    return Training({"model": model, "optimizer": optimizer}, step)


def compiled() -> Training:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    fast = torch.compile(model, backend="eager")
    fast_step = torch.compile(optimizer.step, backend="eager")

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(fast, x, y).backward()
        fast_step()

    return Training({"model": fast, "optimizer": optimizer}, step)


def generators() -> Training:
    """Own random generators of all kinds, and plain state with arrays that other code refers to."""
    own: dict[str, Any] = {
        "py": random.Random(3),
        "np_new": np.random.default_rng(3),
        "np_old": np.random.RandomState(3),
        "torch_own": torch.Generator().manual_seed(3),
    }
    inner = torch.zeros(3)
    weight = nn.Parameter(torch.zeros(WIDTH))
    tree: dict[str, Any] = {"inner": inner, "list": [np.zeros(2), {"n": 0}], "seen": []}

    def step(run: holdfast.Run, x: Tensor, y: Tensor) -> None:
        noise = own["py"].random() + own["np_new"].random() + own["np_old"].random()
        inner.add_(torch.rand(3, generator=own["torch_own"]) + noise)
        tree["list"][0] += 1
        tree["list"][1]["n"] += 1
        tree["seen"].append(float(x.sum()))
        with torch.no_grad():
            weight.add_(inner.sum())

    class State:
        def state_dict(self) -> dict[str, Any]:
            return {name: getattr(value, "getstate", lambda: 0)() for name, value in own.items()}

    training = Training({**own, "tree": tree, "weight": weight}, step)
    training.result = lambda: digest(  # type: ignore[method-assign]
        [
            tree,
            weight,
            own["py"].random(),
            own["np_new"].random(),
            own["np_old"].random(),
            torch.rand(1, generator=own["torch_own"]),
        ]
    )
    return training


def run_once(
    make: Callable[[], Training],
    stores: Stores,
    *,
    epochs: int = 2,
    kill_in_step: int | None = None,
    save_every: Any = "1 step",
    loader: Any = None,
    **options: Any,
) -> str:
    """One attempt. `kill_in_step`: dies in the middle of that step, after everything that is under way is durable."""
    seeded()
    training = make()
    batches = data() if loader is None else loader
    with holdfast.Run("./run", save_every=save_every, open_store=stores, **options) as run:
        run.track(**training.tracked)
        for _ in run.epochs(epochs):
            for batch in run.batches(batches):
                x, y = batch
                if run.step == kill_in_step:
                    raise Killed
                training.step(run, x, y)
            training.evaluate(run)
    return training.result()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it does not happen")
