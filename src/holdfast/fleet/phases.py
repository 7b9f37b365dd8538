"""Where a launch stands: one word for each, from its records and what lists have shown.

ASKED ──→ COMING ──→ STANDBY ──→ WORKING ──→ LEAVING ──→ OVER
  └─→ REFUSED ─────────────────────────────────────────────┘
"""

from __future__ import annotations

from enum import Enum

from holdfast.fleet.terms import Terms
from holdfast.fleet.view import LaunchView, RunView

__all__ = ["Phase", "is_absent", "is_superseded", "phase_of"]


class Phase(Enum):
    ASKED = "asked"
    """Written down; the provider has not answered, as far as is known."""
    REFUSED = "refused"
    """Failed, or given up; not booked yet."""
    COMING = "coming"
    """There is a machine; it boots and sets up."""
    STANDBY = "standby"
    """It is ready, and waits for its predecessor."""
    WORKING = "working"
    LEAVING = "leaving"
    """It has released, or was told to end before it has claimed."""
    OVER = "over"
    """Booked."""


def phase_of(launch: LaunchView) -> Phase:
    if launch.ended is not None:
        return Phase.OVER
    if launch.answer is None:
        return Phase.ASKED
    if launch.answer.outcome != "machine":
        return Phase.REFUSED
    if launch.released is not None or (launch.told("home") and launch.claimed is None):
        return Phase.LEAVING
    if launch.claimed is not None:
        return Phase.WORKING
    return Phase.STANDBY if launch.word("ready") is not None else Phase.COMING


def is_absent(view: RunView, launch: LaunchView, terms: Terms, since_s: float) -> bool:
    """Whether lists prove that nothing of this launch is there, if something can have come until `since_s` at the latest.

    A list may be as old as the provider's window; one alone proves nothing, since lists come from several servers.
    """
    from_s = launch.evidence.absent_since_s
    if from_s is None or view.listed_s is None or view.listed_s <= from_s:
        return False
    return view.listed_s > max(from_s, int(since_s)) + terms.guarantees.list_delay_s


def is_superseded(view: RunView, launch: LaunchView) -> bool:
    """Whether the machine that stood by for it has begun to work."""
    return any(
        each.intent is not None and each.intent.predecessor == launch.launch and each.claimed is not None
        for each in view.launches
    )
