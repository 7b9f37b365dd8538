"""What the adapters' victims train on: streams over samples of theirs, with a state and without; how they hand over a result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["StatefulStream", "Stream", "fetched", "hand_over"]

fetched: list[int] = []
"""The samples that this process has made, in order."""


class Stream(IterableDataset[dict[str, Any]]):
    """In order, and without a state."""

    def __init__(self, sample: Callable[[int], dict[str, Any]], count: int) -> None:
        self.sample, self.count = sample, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.count):
            yield self.sample(index)


class StatefulStream(Stream):
    """Goes on where it was. `endless`: begins again at its end, and does not say so."""

    def __init__(self, sample: Callable[[int], dict[str, Any]], count: int, *, endless: bool = False) -> None:
        super().__init__(sample, count)
        self.endless, self.next = endless, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.endless or self.next < self.count:
            index, self.next = self.next % self.count, self.next + 1
            yield self.sample(index)
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def hand_over(outcome: dict[str, Any], result: str, rank: int | None = None) -> None:
    """What came out goes to `result` and what was fetched stands beside it, with the rank at the end where there are several."""
    end = "" if rank is None else f".{rank}"
    temporary = Path(f"{result}.{os.getpid()}")
    temporary.write_text(json.dumps(outcome))
    temporary.replace(result + end)
    Path(result).with_name(f"fetched{end}").write_text(json.dumps(fetched))
