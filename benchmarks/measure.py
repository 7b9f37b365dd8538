"""How everything is timed, and the machine's own limits measured with it.

One round measures every contestant once; the order rotates from round to round, and the first round is thrown away. Ratios are made
inside a round and their median is taken, so that a machine that gets slower or faster meanwhile does not favour anybody.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from blake3 import blake3

__all__ = ["Samples", "Scenario", "floors", "give_memory_back", "settle", "timed", "turns"]

MIB = 1 << 20
Turn = TypeVar("Turn")
Samples = dict[str, dict[str, list[float]]]
"""Contestant → figure → one value per round. Figures ending in `_s` are seconds."""


class Scenario:
    """What one scenario found. `facts` are sizes and the like; `notes` go under the table."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.samples: Samples = {}
        self.facts: dict[str, float] = {}
        self.notes: list[str] = []
        self.verified: list[str] = []
        """Contestants whose restored values were compared with what was saved, byte by byte."""

    def add(self, contestant: str, figure: str, value: float) -> None:
        self.samples.setdefault(contestant, {}).setdefault(figure, []).append(value)

    def verify(self, contestant: str, saved: dict[str, str], restored: dict[str, str]) -> None:
        """Raises when a single tensor differs: a quick library that restores something else has not won."""
        wrong = [name for name in saved if restored.get(name) != saved[name]]
        if wrong or len(saved) != len(restored):
            raise AssertionError(f"{contestant}: {len(wrong)} tensors differ after save and restore, {wrong[:1]} first")
        self.verified.append(contestant)


def turns(contestants: Sequence[Turn], rounds: int) -> Iterator[tuple[bool, Turn]]:
    """(does it count?, whose turn it is): a round to warm up, then `rounds` that count, each in another order."""
    for number in range(rounds + 1):
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            yield number > 0, contestant


def settle() -> None:
    """The same start for everybody: nothing waits to be written back, and no garbage waits to be collected."""
    os.sync()
    gc.collect()


def give_memory_back() -> None:
    """Free memory goes back to the kernel, as if the process had just started: a resume does not find warm memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def timed(action: Callable[[], object]) -> float:
    gc.collect()
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def floors(folder: Path, size_bytes: int, rounds: int) -> Scenario:
    """What this machine can do at most: memory, hashing, disk. Everything else stands beside these."""
    found = Scenario(f"{size_bytes // MIB} MiB")
    found.facts["bytes"] = size_bytes
    source, target = (np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8) for _ in range(2))
    source[:] = np.random.default_rng(0).integers(0, 256, MIB, np.uint8).repeat(size_bytes // MIB)
    target[:] = 0
    file = folder / "floor"
    actions: dict[str, Callable[[], object]] = {
        "memcpy, 1 thread": lambda: np.copyto(target, source),
        "memcpy, 2 threads": lambda: _halves(lambda part: np.copyto(target[part], source[part]), size_bytes),
        "BLAKE3 of 1 MiB blocks, 1 thread": lambda: _hash(source),
        "BLAKE3 of 1 MiB blocks, 2 threads": lambda: _halves(lambda part: _hash(source[part]), size_bytes),
        "write + fsync": lambda: _write(file, source.data, 0),
        "write + fsync, past the page cache": lambda: _write(file, source.data, os.O_DIRECT),
        "read from the page cache, 1 thread": lambda: _read(file, target.data, 0),
        "read from the page cache, 2 threads": lambda: _halves(
            lambda part: _read(file, target[part].data, part.start), size_bytes
        ),
    }
    file.write_bytes(source.data)
    for counts, (name, action) in turns(list(actions.items()), rounds):
        settle()
        try:
            seconds = timed(action)
        except OSError:
            found.notes = [f"not possible on this file system: {name}"]
            continue
        if counts:
            found.add(name, "seconds_s", seconds)
    file.unlink()
    return found


def _halves(work: Callable[[slice], object], size_bytes: int) -> None:
    half = size_bytes // 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (slice(0, half), slice(half, size_bytes))))


def _hash(data: np.ndarray) -> None:
    for start in range(0, len(data), MIB):
        blake3(data[start : start + MIB].data).digest()


def _write(file: Path, data: memoryview, flags: int) -> None:
    """Into a new file, as every save does; the old one keeps its place until then, as every old checkpoint does."""
    new = file.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
    try:
        while len(data):
            data = data[os.write(descriptor, data[: 64 * MIB]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if flags:
        new.unlink()  # what went past the page cache would not be read from it
    else:
        new.replace(file)


def _read(file: Path, target: memoryview, offset: int) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while len(target):
            count = os.preadv(descriptor, [target], offset)
            target, offset = target[count:], offset + count
    finally:
        os.close(descriptor)
