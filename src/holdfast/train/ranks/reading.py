"""How the ranks of one machine read a checkpoint: what several of them want is fetched by one (checkpoint/machine_cache.py).

targets → objects that this rank wants ─ exchange → who fetches what ─ each fetches ─ exchange → all read from shared memory
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from holdfast.checkpoint.machine_cache import (
    Fetching,
    MachineCache,
    WantedHere,
    room_bytes,
    share_fetching,
    this_machine,
)
from holdfast.checkpoint.read import CheckpointReader
from holdfast.checkpoint.targets import Target
from holdfast.store.base import Store
from holdfast.train.ranks.together import Together

__all__ = ["ReadingTogether"]

_FETCH_S = 3600.0
"""For all ranks of the job to fetch their objects. One that is dead is noticed at once."""


class ReadingTogether:
    """One try to restore a checkpoint. `close` once all ranks have read. Methods raise RanksApart."""

    def __init__(
        self, together: Together, store: Store, name: str, *, run_id: str, attempt: int, at_hand: Collection[str] = ()
    ) -> None:
        """`name`: of the checkpoint. `at_hand`: objects that lie on this machine's disk, where each rank reads them itself."""
        self._together, self._store, self._name = together, store, name
        self._run_id, self._attempt, self._at_hand = run_id, attempt, at_hand
        self._machine = "" if store.is_near else this_machine()
        self._cache: MachineCache | None = None
        self._has_agreed = False

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def prepare(self, reader: CheckpointReader, wanted: Sequence[Target], pool: ThreadPoolExecutor) -> None:
        """All ranks call it before they read, or `pass_by`. What the machine has then in memory, `reader` reads from there."""
        found = reader.objects_of(wanted) if self._machine and reader.ref.home is None else {}
        sizes = {key: size_bytes for key, size_bytes in found.items() if key not in self._at_hand}
        ours = self._agree(sizes)
        if ours is not None and ours.is_shared:
            self._cache = MachineCache(ours.folder, sizes.keys())
            self._cache.fetch(self._store, ours.keys, sizes, pool)
        if ours is not None:
            self._all_have_fetched()
        if self._cache is not None:
            self._cache.open()
            reader.add_near(self._cache)

    def pass_by(self) -> None:
        """This rank reads nothing after all, and says so where the others wait for it."""
        if not self._has_agreed and self._agree({}) is not None:
            self._all_have_fetched()

    def _agree(self, sizes: dict[str, int]) -> Fetching | None:
        """What this rank fetches; None where no machine shares anything."""
        self._has_agreed = True
        if self._store.is_near:
            return None
        mine = WantedHere(self._machine, room_bytes(), sizes)

        def share(payloads: list[bytes]) -> list[bytes]:
            ranks = [msgspec.msgpack.decode(payload, type=WantedHere) for payload in payloads]
            plan = share_fetching(ranks, self._run_id, self._attempt)
            is_any = any(one.is_shared for one in plan)
            return [msgspec.msgpack.encode(one if is_any else None) for one in plan]

        answer = self._together.exchange(
            f"wanted {self._name}", msgspec.msgpack.encode(mine), share, what="sharing out what is to be read"
        )
        return msgspec.msgpack.decode(answer, type=Fetching | None)

    def _all_have_fetched(self) -> None:
        self._together.exchange(
            f"fetched {self._name}", b"", lambda payloads: b"", what="fetching the checkpoint", timeout_s=_FETCH_S
        )
