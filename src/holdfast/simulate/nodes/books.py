"""What is written down of the work in every window, whatever kind of work it is: when it ended, and where the time went."""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import Bools, Ints
from holdfast.simulate.market.outcome import UNFINISHED

__all__ = ["Books"]


class Books:
    """One array element per window."""

    def __init__(self, windows: int) -> None:
        self.finish_s: Ints = np.full(windows, UNFINISHED, np.int64)
        self.over, self.stopped = np.zeros((2, windows), np.bool_)
        self.worked_node_s, self.lost_node_s, self.changeover_node_s, self.idle_node_s = np.zeros(
            (4, windows), np.int64
        )
        self.waiting_s: Ints = np.zeros(windows, np.int64)

    def close(self, at_s: Ints, finished: Bools, unpaid: Bools) -> Bools:
        """Windows that end now: because nothing is left of the work, or no money for more of it. Which these are."""
        done = finished & ~self.over
        ended: Bools = done | unpaid
        if ended.any():
            self.finish_s = np.where(done, at_s, self.finish_s)
            self.stopped |= unpaid & ~done
            self.over |= ended
        return ended
