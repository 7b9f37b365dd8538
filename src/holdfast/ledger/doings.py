"""What the loop's thread of an attempt can be doing. The trainer adds up time under these names, and the report reads it back."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Doing"]


class Doing(IntEnum):
    """At every moment exactly one of these."""

    STARTUP = 0
    """From the start of the process until the run is opened: imports, the device, the model."""
    RESTORE = 1
    """Claiming the run and reading its checkpoint."""
    PREPARATION = 2
    """The script's own code outside of the loops."""
    DATA = 3
    """Waiting for the next batch."""
    STEP = 4
    """An iteration of a loop, the script's code between loops over batches of one epoch included."""
    STALL = 5
    """The loop stands still for a save."""
    EVALUATION = 6

    @property
    def field(self) -> str:
        """The field of events that holds its running total."""
        return f"{self.name.lower()}_s"
