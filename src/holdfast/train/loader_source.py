"""What the loop asks of any kind of loader, and what all DataLoaders have in common.

The kinds are in loader.py (one order, cut up for the ranks) and own_sources.py (each rank reads its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch.utils.data import ConcatDataset, Subset, TensorDataset

from holdfast.core.errors import UsageError
from holdfast.data.global_batch import Micro
from holdfast.data.seeds import derive_seed
from holdfast.train.batch_order import EpochOrder
from holdfast.train.loader_twin import LoaderTwin, unwrapped
from holdfast.train.sample_seeds import SeededCollate, SeededDataset, StatefulSeededDataset
from holdfast.train.sampler_parts import SamplerParts

__all__ = ["Circumstances", "LoaderSource", "Source", "Uncounted", "cannot_be_random", "has_state", "length_or_none"]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a loader is used under. `warn` is told what costs the user something, `say` what is done differently than the script
    says."""

    seed: int
    rank: int
    world_size: int
    warn: Callable[[str], None]
    say: Callable[[str], None]


class Source(Protocol):
    """One kind of loader."""

    @property
    def kind(self) -> str: ...

    isolated: bool
    """Fetching may draw from the main process's generators, so it happens in isolation."""
    is_own: bool
    """Each rank reads its own: a position says nothing about another number of ranks."""

    @property
    def draws_by_batch(self) -> bool:
        """Which sample is at a place depends on the size of batches."""
        ...

    def open(self, epoch: int, start_batch: int, start_sample: int) -> tuple[Iterator[Any], int]:
        """A pass, and how many batches must be taken from it and dropped to be at its start."""
        ...

    def check_started(self) -> None:
        """Called after the first batch of a pass."""
        ...

    def micro(self) -> Micro:
        """What there is to say about the next batch of the pass. Asked once for each, in order."""
        ...

    def accumulate(self, global_batch: int | None) -> None:
        """Make steps of so many samples, from the next pass on; None: of one batch on each rank."""
        ...

    @property
    def step_samples(self) -> int | None:
        """How many samples a step has over all ranks; None where that is not known."""
        ...

    def is_over(self, batch: int, sample: int) -> bool: ...

    def length(self) -> int | None:
        """In steps."""
        ...

    def state(self) -> dict[str, Any] | None: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]: ...

    def why_skipping(self) -> str:
        """The reason why batches must be read and dropped, and what would avoid it."""
        ...


def has_state(candidate: object) -> bool:
    return callable(getattr(candidate, "state_dict", None)) and callable(getattr(candidate, "load_state_dict", None))


def cannot_be_random(dataset: object) -> bool:
    """Tensors that are indexed draw nothing, so seeding them would be a cost without a use. Exact types: a subclass may augment."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is ConcatDataset:
        return all(cannot_be_random(part) for part in dataset.datasets)
    return type(dataset) is TensorDataset


def length_or_none(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


class Uncounted:
    """What a source says that counts no samples and keeps no state."""

    def length(self) -> int | None:
        raise NotImplementedError

    def check_started(self) -> None:
        return None

    def micro(self) -> Micro:
        return Micro()

    @property
    def step_samples(self) -> int | None:
        return None

    def is_over(self, batch: int, sample: int) -> bool:
        return batch == self.length()

    def state(self) -> dict[str, Any] | None:
        return None


class LoaderSource(Uncounted):
    """What all DataLoaders have in common."""

    kind: ClassVar[str] = "dataloader"

    def __init__(self, loader: Any, parts: SamplerParts, under: Circumstances) -> None:
        self._loader = loader
        self._base = unwrapped(loader)
        self.is_own = parts.is_own
        self._order = EpochOrder(parts, under.seed, bare=self._is_bare(), rank=under.rank, world_size=under.world_size)
        self._twin = LoaderTwin(loader, under.seed, self._parts(under))
        self.isolated = self._base.num_workers == 0 or not self._twin.stock

    @property
    def draws_by_batch(self) -> bool:
        return self._order.parts.draws_by_batch

    def _is_bare(self) -> bool:
        """Samples get no seeds."""
        return False

    def _parts(self, under: Circumstances) -> dict[str, Any]:
        return {}

    def _seeded_parts(self, under: Circumstances, sampler: Any) -> dict[str, Any]:
        base, seed = self._base, under.seed
        if self.is_own and under.world_size > 1:
            # Place k of one rank's order is another sample than place k of the next one's.
            seed = derive_seed(seed, "rank", under.rank)
        kind = StatefulSeededDataset if has_state(base.dataset) else SeededDataset
        return {
            **self._sampler_part(sampler),
            "dataset": kind(base.dataset, seed, per_sample=not cannot_be_random(base.dataset)),
            "collate_fn": SeededCollate(base.collate_fn, seed),
        }

    def _sampler_part(self, sampler: Any) -> dict[str, Any]:
        return {"sampler" if self._base.batch_sampler is None else "batch_sampler": sampler}

    def accumulate(self, global_batch: int | None) -> None:
        if global_batch is not None:
            raise UsageError(
                f"global_batch={global_batch} needs samples that can be counted and shared out among the ranks, and with this "
                f"{type(self._loader).__name__} (sampler: {type(self._order.parts.sampler).__name__}) each rank reads its own. Use "
                "a DataLoader over a map-style dataset with batch_size=…, or leave global_batch out"
            )

    def length(self) -> int | None:
        return length_or_none(self._base)

    def load_state(self, state: dict[str, Any]) -> None:
        raise UsageError(f"the checkpoint has a loader state, but this {type(self._loader).__name__} keeps none")

    def why_skipping(self) -> str:
        return "the loader has no state"

    def describe(self) -> dict[str, Any]:
        base, parts = self._base, self._order.parts
        return {
            "dataset": type(base.dataset).__name__,
            "samples": length_or_none(base.dataset),
            "batch_size": base.batch_size if parts.size is None else parts.size,
            "drop_last": bool(base.drop_last or parts.drop_last),
            "sampler": type(parts.sampler).__name__,
            "num_workers": base.num_workers,
        }
