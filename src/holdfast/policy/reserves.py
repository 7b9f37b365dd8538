"""How the last seconds before a deadline are shared out, so that trainer and agent never work against each other.

    the trainer saves | margin + leave: it flushes and ends; the agent says SIGTERM | SIGKILL, the agent's own | deadline

Trainer and agent compute the same figures from the same notice. A notice that leaves only a few seconds leaves a share of each.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Reserves", "reserves"]

_FULL_FROM_S = 20.0
"""With this much notice or more, the reserves are whole; with less, they shrink in proportion."""
_MARGIN_S, _LEAVE_S, _AGENT_S = 2.0, 2.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserves:
    """Invariant: `agent_s + told_s == margin_s + leave_s`: whoever keeps to its plan has ended when it is told to."""

    margin_s: float
    """Machines go a little early, and clocks differ. No save is planned to end in it."""
    leave_s: float
    """For flushing figures and logs, and the end of the process."""
    agent_s: float
    """From the SIGKILL until the deadline: a snapshot in memory, the logs, the acknowledgement."""
    told_s: float
    """From the SIGTERM until the SIGKILL, for a trainer that has heard the notice itself."""


def reserves(lead_s: float | None) -> Reserves:
    """For a notice that left `lead_s` when it was heard; None: nobody knows when the machine goes."""
    share = 1.0 if lead_s is None else min(1.0, max(0.0, lead_s) / _FULL_FROM_S)
    return Reserves(
        margin_s=_MARGIN_S * share,
        leave_s=_LEAVE_S * share,
        agent_s=_AGENT_S * share,
        told_s=(_MARGIN_S + _LEAVE_S - _AGENT_S) * share,
    )
