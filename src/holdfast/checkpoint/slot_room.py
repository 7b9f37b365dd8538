"""The slots of a saver: how many there are and of what size, made when the state asks for them, given back at the end.

layout → budget (staging.py) → slots, whose pages come in the background → their memory is handed to an heir
"""

from __future__ import annotations

import threading

from holdfast.checkpoint.handover import Legacy
from holdfast.checkpoint.outcomes import Outcomes
from holdfast.checkpoint.promote import PROMOTION_BYTES
from holdfast.checkpoint.snapshot import Layout
from holdfast.checkpoint.staging import Slot, StagingBudget, available_memory_bytes, plan_slots

__all__ = ["SlotRoom"]


class SlotRoom:
    """Owned by the saver, whose condition guards `free`. `make` and `close` belong to the loop's thread."""

    def __init__(
        self, *, cap_bytes: int | None, local_ranks: int, promotes: bool, legacy: Legacy | None, outcomes: Outcomes
    ) -> None:
        """`promotes`: what is staged goes to a disk, and from there to the store, which takes memory of its own."""
        self._cap_bytes, self._local_ranks, self._promotes = cap_bytes, local_ranks, promotes
        self._legacy, self._outcomes = legacy, outcomes
        self.budget = StagingBudget(0, -1, 0)
        """As of the last layout that room was made for."""
        self.slots: list[Slot] = []
        self.free: list[Slot] = []
        self._given_up = threading.Event()
        self._faulting: threading.Thread | None = None

    def fits(self, layout: Layout) -> bool:
        """Whether room was made for a layout of at least this size."""
        return layout.total_bytes <= self.budget.slot_bytes

    def make(self, layout: Layout) -> None:
        """Room for this layout. What was there before is closed."""
        budget = self.budget = plan_slots(
            layout.total_bytes,
            cap_bytes=self._staging_cap_bytes(layout),
            available_bytes=available_memory_bytes(),
            local_ranks=self._local_ranks,
        )
        self.slots = [Slot(budget.slot_bytes) for _ in range(budget.slots)]
        self.free = list(self.slots)
        if self._legacy is not None:
            self._legacy.slots_made(self.slots)
        self._provide(self.slots)
        self._outcomes.emit(
            "staging.planned", slots=budget.slots, slot_bytes=budget.slot_bytes, cap_bytes=budget.cap_bytes
        )
        if budget.slots == 0:
            self._outcomes.note(
                f"one snapshot ({layout.total_bytes} bytes) does not fit under the staging cap ({budget.cap_bytes} bytes): "
                "saves now stop the loop until they are durable. Raise staging_cap or give the machine more memory"
            )

    def _staging_cap_bytes(self, layout: Layout) -> int | None:
        """What promotions need is part of the cap: two objects at once, or the whole state where that is less."""
        if self._cap_bytes is None or not self._promotes:
            return self._cap_bytes
        return max(0, self._cap_bytes - min(PROMOTION_BYTES, layout.total_bytes))

    def _provide(self, slots: list[Slot]) -> None:
        """In an order that serves a first save as early as possible. Ends early when the slots are to be closed."""
        given_up = self._given_up = threading.Event()

        def fault_in() -> None:
            for slot in slots:
                slot.fault_in(given_up.is_set)

        self._faulting = threading.Thread(target=fault_in, name="holdfast-staging", daemon=True)
        self._faulting.start()

    def close(self, *, inherited: bool = False) -> None:
        """Give the memory back; `inherited`: an heir keeps what it has of it."""
        self._given_up.set()
        if self._faulting is not None:
            self._faulting.join()
        if self._legacy is not None and self.slots and not inherited:
            # An heir holds the memory as well: it is free only when both have let go.
            self._legacy.slots_made([])
        for slot in self.slots:
            slot.close()
        self.slots, self.free = [], []
