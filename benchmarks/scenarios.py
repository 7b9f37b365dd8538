"""What is measured, scenario by scenario. Each runs in a process of its own, so that no allocator carries over to the next.

saves     blocked, and seconds until durable, with nothing running beside
restores  from a warm page cache into a live model
loop      what one save costs a training loop: blocked, the wait at the gate, and the slowdown of the steps beside it
frozen    what the second save costs when a tenth of the bytes changes
s3        an S3 server on loopback, against the same client moving raw objects
batches   what run.batches adds to every step
"""

from __future__ import annotations

import collections
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from clients import HoldfastOnS3, RawClient
from contestants import Contestant
from measure import MIB, Scenario, floors, give_memory_back, settle, timed, turns
from peers import make
from states import State, build, fingerprint
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.testing.servers import ministack_server

__all__ = ["Plan", "plan"]

_ALL_SAVE = (
    "raw file", "holdfast", "torch.save", "safetensors", "DCP save", "DCP async_save", "DCP async_save, async staging",
    "torch_checkpointing", "torchsnapshot", "orbax",
)  # fmt: skip
_ALL_RESTORE = (
    "raw file", "holdfast", "torch.save", "torch.load(mmap)", "safetensors", "DCP save", "torch_checkpointing",
    "torchsnapshot", "orbax",
)  # fmt: skip
# torchsnapshot and orbax are the slowest and stay with the small state; at 4 GiB those that stage do not fit side by side.
_LARGE_SAVE = ("raw file", "holdfast", "torch.save", "safetensors", "DCP save")
_LARGE_RESTORE = ("holdfast", "torch.save", "torch.load(mmap)")
_COLD = ("raw file", "holdfast", "torch.save", "DCP save")
_QUICK_SAVE = ("raw file", "holdfast", "torch.save", "safetensors", "DCP async_save")
_QUICK_RESTORE = ("raw file", "holdfast", "torch.save", "torch.load(mmap)", "safetensors")
_SMALL = ("holdfast", "torch.save", "safetensors", "DCP save")
_LOOP = ("holdfast", "DCP async_save", "DCP async_save, async staging", "torch_checkpointing")
_QUIET_STEPS = 3


def saves(folder: Path, rounds: int, state_name: str, names: Sequence[str]) -> Scenario:
    """Every byte changes before every save."""
    state, found = build(state_name), Scenario(state_name)
    found.facts["bytes"] = state.total_bytes()
    contestants = _begun(names, folder, state)
    for counts, contestant in turns(contestants, rounds):
        state.change()
        settle()
        _save(found, contestant, state, counts)
    for contestant in contestants:
        contestant.close()
    return found


def _begun(names: Sequence[str], folder: Path, state: State) -> list[Contestant]:
    contestants = make(names, folder)
    for contestant in contestants:
        contestant.begin(state)
    return contestants


def _save(found: Scenario, contestant: Contestant, state: State, counts: bool, prefix: str = "") -> None:
    started_s = time.perf_counter()
    pending = contestant.save(state)
    blocked_s = time.perf_counter() - started_s
    pending.wait()
    durable_s = time.perf_counter() - started_s
    if counts:
        found.add(contestant.name, f"{prefix}blocked_s", blocked_s)
        found.add(contestant.name, f"{prefix}durable_s", durable_s)
    contestant.tidy()


def restores(folder: Path, rounds: int, state_name: str, names: Sequence[str], *, cached: bool = True) -> Scenario:
    """The model is live and warm; AdamW has its moments only where a contestant needs them.

    `cached`: the files lie in the page cache; otherwise they come from the disk, as on another machine that it was attached to.
    """
    state, found = build(state_name), Scenario(state_name if cached else f"{state_name}, from the disk")
    found.facts["bytes"] = state.total_bytes()
    saved = fingerprint(state)
    contestants = _begun(names, folder, state)
    for contestant in contestants:
        contestant.save(state).wait()
        contestant.end_saving()
    del state
    target = build(state_name, zeros=True)
    for counts, contestant in turns(contestants, rounds):
        _restore(found, contestant, target, counts, saved, cached=cached)
    for contestant in contestants:
        contestant.close()
    return found


def _restore(
    found: Scenario,
    contestant: Contestant,
    live: State,
    counts: bool,
    saved: dict[str, str],
    *,
    cached: bool = True,
) -> None:
    torch._foreach_zero_(live.tensors())
    target = live if contestant.restores_into_moments else live.at_start()
    settle()
    contestant.cache_files(wanted=cached)
    give_memory_back()
    seconds = timed(lambda: contestant.restore(target))
    if counts:
        found.add(contestant.name, "restore_s", seconds)
    if contestant.name not in found.verified:
        found.verify(contestant.name, saved, fingerprint(target))
    contestant.after_restore()


def loop(folder: Path, rounds: int, state_name: str, threads: int, names: Sequence[str]) -> Scenario:
    """Steps with a save in flight against steps without one, before and after it. The step is forward, backward and AdamW."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    state, found = build(state_name), Scenario(f"{state_name}, training on {threads} of {os.cpu_count()} CPUs")
    found.facts["bytes"] = state.total_bytes()
    contestants = _begun(names, folder, state)
    copy = _Copy(state)
    for counts, contestant in turns(contestants, rounds):
        settle()
        quiet = _quiet_steps(state)
        copy_s = timed(copy)
        figures = _steps_beside_a_save(state, contestant)
        contestant.tidy()
        settle()
        step_s = statistics.mean(quiet + _quiet_steps(state))
        cost_s = figures.pop("seconds") - figures.pop("steps") * step_s
        figures |= {"cost_s": cost_s, "slowdown_s": cost_s - figures["blocked_s"] - figures["gate_s"]}
        for figure, value in {**figures, "memcpy_s": copy_s, "step_s": step_s}.items():
            if counts:
                found.add(contestant.name, figure, value)
    del copy
    for contestant in contestants:
        _verify_in_flight(found, state, contestant)
        contestant.close()
    return found


class _Copy:
    """One copy of the state into memory that is warm: what any consistent snapshot costs at least."""

    def __init__(self, state: State) -> None:
        self._source = state.tensors()
        self._target = [tensor.clone() for tensor in self._source]

    def __call__(self) -> None:
        torch._foreach_copy_(self._target, self._source)


def _quiet_steps(state: State) -> list[float]:
    state.step()
    return [timed(state.step) for _ in range(_QUIET_STEPS)]


def _steps_beside_a_save(state: State, contestant: Contestant) -> dict[str, float]:
    """Until the save is durable, and one step more: what a library cleans up afterwards counts too."""
    gate_s, steps, durable = 0.0, 0, False
    started_s = time.perf_counter()
    pending = contestant.save(state)
    blocked_s = time.perf_counter() - started_s
    while not durable:
        durable = pending.done()
        state.forward_backward()
        at_gate_s = time.perf_counter()
        pending.gate()
        gate_s += time.perf_counter() - at_gate_s
        state.optimizer.step()
        steps += 1
    seconds = time.perf_counter() - started_s
    pending.wait()
    return {"blocked_s": blocked_s, "gate_s": gate_s, "seconds": seconds, "steps": steps}


def _verify_in_flight(found: Scenario, state: State, contestant: Contestant) -> None:
    """A save that training goes on beside must hold the values from when it was asked for."""
    saved = fingerprint(state)
    pending = contestant.save(state)
    for _ in range(3):
        state.forward_backward()
        pending.gate()
        state.optimizer.step()
    pending.wait()
    contestant.end_saving()
    target = build(state.name, zeros=True)
    restored = target if contestant.restores_into_moments else target.at_start()
    contestant.restore(restored)
    contestant.after_restore()
    found.verify(contestant.name, saved, fingerprint(restored))


def frozen(folder: Path, rounds: int, state_name: str, names: Sequence[str]) -> Scenario:
    """Each round: a save of which every byte is new, then two of which only what trains is; and restores of the last."""
    state, found = build(state_name), Scenario(state_name)
    total_bytes = state.total_bytes()
    found.facts |= {"bytes": total_bytes, "changed_bytes": state.total_bytes(trained_only=True)}
    contestants = _begun(names, folder, state)
    for counts, contestant in turns(contestants, rounds):
        state.change()
        settle()
        _save(found, contestant, state, counts, "full_")
        for _ in range(2):
            before = contestant.objects()
            state.change(trained_only=True)
            settle()
            _save(found, contestant, state, counts, "later_")
            new_bytes = sum(size for key, size in contestant.objects().items() if key not in before)
            if counts:
                found.add(contestant.name, "later_share", new_bytes / total_bytes)
    for contestant in contestants:
        contestant.save(state).wait()
        contestant.end_saving()
    saved, target = fingerprint(state), build(state_name, zeros=True)
    for counts, contestant in turns(contestants, rounds):
        _restore(found, contestant, target, counts, saved)
    return found


def s3(folder: Path, rounds: int, state_name: str) -> Scenario:
    """One server, in memory and in one process: it is the same for both, and slower than a real one."""
    state, found = build(state_name), Scenario(f"{state_name}, S3 on loopback")
    found.facts["bytes"] = state.total_bytes()
    with ministack_server() as server:
        url = server.make_bucket("bench")
        contestants: list[Contestant] = [RawClient(folder, url, server), HoldfastOnS3(folder, url, server)]
        for contestant in contestants:
            contestant.begin(state)
        for counts, contestant in turns(contestants, rounds):
            state.change()
            settle()
            _save(found, contestant, state, counts)
        saved, target = fingerprint(state), build(state_name, zeros=True)
        for contestant in contestants:
            contestant.save(state).wait()
            contestant.end_saving()
        for counts, contestant in turns(contestants, rounds):
            _restore(found, contestant, target, counts, saved)
        for contestant in contestants:
            contestant.close()
    return found


def batches(folder: Path, rounds: int) -> Scenario:
    """Seconds per step of an empty loop body: `run.batches` and the bare loader take turns."""
    found = Scenario("1,024 steps of an empty body")
    data = TensorDataset(torch.randn(4096, 8), torch.zeros(4096))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    with holdfast.Run(str(folder / "run"), save_every="1 h") as run:
        run.track(state={"n": 0})
        for epoch in run.epochs(2 * (rounds + 1)):
            is_ours = epoch % 2 == (epoch // 2) % 2
            iterable = run.batches(loader) if is_ours else loader
            seconds = timed(lambda: collections.deque(iterable, maxlen=0))  # noqa: B023  called here and now
            if epoch >= 2:
                found.add("run.batches" if is_ours else "bare loop", "step_s", seconds / len(loader))
    return found


Plan = dict[str, Callable[[Path, int], Scenario]]


def plan(quick: bool) -> Plan:
    """The scenarios by name, in the order that they run in. `quick` takes smaller states."""
    large, adapters, tenth = ("256 MiB", "LoRA, 256 MiB", "90 % frozen, 240 MiB") if quick else (
        "1 GiB", "LoRA, 1 GiB", "90 % frozen, 960 MiB"
    )  # fmt: skip
    cpus = os.cpu_count() or 1
    chosen: Plan = {
        "floors": lambda folder, rounds: floors(folder, (256 if quick else 1024) * MIB, rounds),
        "batches": batches,
        "saves-256M": lambda folder, rounds: saves(folder, rounds, "256 MiB", _QUICK_SAVE if quick else _ALL_SAVE),
        "restores-256M": lambda folder, rounds: restores(
            folder, rounds, "256 MiB", _QUICK_RESTORE if quick else _ALL_RESTORE
        ),
        "saves-1G": lambda folder, rounds: saves(folder, rounds, "1 GiB", _ALL_SAVE[:-2]),
        "restores-1G": lambda folder, rounds: restores(folder, rounds, "1 GiB", _ALL_RESTORE[:-2]),
        "restores-cold-1G": lambda folder, rounds: restores(folder, rounds, "1 GiB", _COLD, cached=False),
        "saves-4G": lambda folder, rounds: saves(folder, rounds, "4 GiB", _LARGE_SAVE),
        "restores-4G": lambda folder, rounds: restores(folder, rounds, "4 GiB", _LARGE_RESTORE),
        "saves-small": lambda folder, rounds: saves(folder, rounds, "10,000 tensors", _SMALL),
        "restores-small": lambda folder, rounds: restores(folder, rounds, "10,000 tensors", _SMALL),
        "loop": lambda folder, rounds: loop(folder, rounds, large, cpus, _LOOP[:2] if quick else _LOOP),
        "loop-spare-cpu": lambda folder, rounds: loop(folder, rounds, large, max(1, cpus - 1), _LOOP[:3]),
        "frozen": lambda folder, rounds: frozen(folder, rounds, tenth, ("holdfast",)),
        "lora": lambda folder, rounds: frozen(folder, rounds, adapters, ("holdfast", "torch.save", "safetensors")),
        "s3": lambda folder, rounds: s3(folder, rounds, "256 MiB"),
    }
    if quick:
        large_ones = ("saves-1G", "restores-1G", "restores-cold-1G", "saves-4G", "restores-4G")
        for name in (*large_ones, "loop-spare-cpu", "lora"):
            del chosen[name]
    return chosen
