"""Ranks of a job, simulated one after the other in one process: each with a place and a loader of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.data.global_batch import Micro
from holdfast.train.place import Place

Row = tuple[float, ...]
Took = list[tuple[Micro, Any]]
MakeLoader = Callable[[int, int], Any]
"""(rank, world size) → the loader of that rank's script."""


class Rank:
    """What `Loops` does with a place, one step at a time."""

    def __init__(
        self, rank: int, world_size: int, make: MakeLoader, *, state: dict[str, Any] | None = None, epochs: int = 3,
        global_batch: int | None = None, strict: bool = True, seed: int = 11,
    ) -> None:  # fmt: skip
        self.warnings: list[str] = []
        self.said: list[str] = []
        self.place = Place(seed=seed, strict=strict, warn=self.warnings.append, say=self.said.append)
        self.place.joins(rank, world_size)
        if state is not None:
            self.place.resume(state)
        self._loader, self._global_batch, self._epochs = make(rank, world_size), global_batch, epochs
        self.place.enter_epochs(epochs)
        self._token: object | None = None
        self._enter()

    def _enter(self) -> None:
        self.place.begin_epoch()
        self._token = self.place.enter_loop(self._loader, self._global_batch)
        self._rest = self.place.rest()

    def step(self) -> Took | None:
        """The micro-batches of the next step; None where the epoch was over: the next one has begun then."""
        took: Took = []
        for batch in self._rest:
            assert self.place.micro_begins() == (not took)
            took.append((self.place.micro, batch))
            if self.place.micro_done():
                return took
        assert not took, "an epoch ends between steps"
        self.place.leave_loop(self._token, counts=False)
        self.place.end_epoch()
        if self.place.position.epoch < self._epochs:
            self._enter()
        return None

    @property
    def ended(self) -> bool:
        return self.place.position.epoch >= self._epochs


def job(world_size: int, make: MakeLoader, states: list[dict[str, Any]] | None, **options: Any) -> list[Rank]:
    """All ranks of a job that goes on from the states of an earlier one's ranks."""
    same = states is not None and len(states) == world_size
    return [
        Rank(rank, world_size, make, state=None if states is None else states[rank if same else 0], **options)
        for rank in range(world_size)
    ]


def rows(took: Took) -> list[Row]:
    """The samples of a step that count, as plain numbers."""
    return [
        tuple(row.tolist())
        for micro, batch in took
        if not micro.is_padding
        for row in batch.reshape(-1, batch.shape[-1])
    ]


def step_of(ranks: list[Rank]) -> list[Row] | None:
    """One step of all ranks: what it took, in the order of ranks. None where the epoch was over."""
    took = [rank.step() for rank in ranks]
    if took[0] is None:
        assert took == [None] * len(ranks), "all ranks see the end of an epoch at the same step"
        return None
    parts = [part for part in took if part is not None]
    assert len({len(part) for part in parts}) == 1, "all ranks have the same number of micro-batches"
    assert sum(micro.weight for part in parts for micro, _ in part) - len(ranks) < 1e-9
    assert len({(rank.place.step, rank.place.position) for rank in ranks}) == 1, "all ranks are at the same place"
    return [row for part in parts for row in rows(part)]
