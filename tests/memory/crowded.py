"""A training whose store is slower than its saves, with loader workers that are forked while staging is written.

Prints, as JSON, the most memory that staging took in the whole process tree (proportional set size, read from the kernel at every
step), and what the cap was.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.store.base import Body
from holdfast.store.memory import MemoryStore

STATE_BYTES = 24 << 20


class SlowStore(MemoryStore):
    """Puts data only when the training has taken a few more steps, or is seen to wait for the writer."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = threading.Semaphore(0)

    def put(self, key: str, body: Body) -> None:
        if key.startswith("data/"):
            for _ in range(3):
                self.steps.acquire(timeout=0.05)
        super().put(key, body)


def tree(pid: int) -> list[int]:
    """`pid` and all its descendants, as far as they can still be seen: threads and processes end while we look."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [child for thread in threads for child in read(Path(f"/proc/{pid}/task/{thread}/children")).split()]
    return [pid, *(one for child in children for one in tree(int(child)))]


def read(path: Path) -> str:
    """A file of /proc; nothing when what it tells of has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def staging_bytes() -> tuple[int, int]:
    """Proportional and mapped bytes of staging in the process tree."""
    proportional = mapped = 0
    for pid in tree(os.getpid()):
        for area in read(Path(f"/proc/{pid}/smaps")).split("holdfast-staging")[1:]:
            for line in area.splitlines()[1:30]:
                if line.startswith("Pss:"):
                    proportional += int(line.split()[1]) * 1024
                elif line.startswith("Size:"):
                    mapped += int(line.split()[1]) * 1024
                elif line.startswith("VmFlags:"):
                    break
    return proportional, mapped


def main(cap_bytes: int, workers: int) -> None:
    store = SlowStore()

    def open_store(url: str, *, options: Mapping[str, str] | None = None) -> MemoryStore:
        return store

    state = torch.zeros(STATE_BYTES // 4)
    data = DataLoader(
        TensorDataset(torch.arange(30)), batch_size=1, num_workers=workers, multiprocessing_context="fork"
    )
    most = (0, 0)
    processes = 0
    with holdfast.Run("memory://crowded", save_every="1 steps", staging_cap=cap_bytes, open_store=open_store) as run:
        run.track(state=state)
        for _ in run.epochs(2):
            for _ in run.batches(data):
                state += 1
                most = max(most, staging_bytes())
                processes = max(processes, len(tree(os.getpid())))
                store.steps.release()
        store.steps.release(1000)
    print(json.dumps({"most_bytes": most[0], "mapped_bytes": most[1], "cap_bytes": cap_bytes, "processes": processes}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
