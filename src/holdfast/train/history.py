"""What a run's attempts have seen of preemptions, carried from checkpoint to checkpoint: what the automatic interval learns from.

    a checkpoint's metadata ──→ History.after ──→ rate, cost of a save ──→ pacing        pacing ──→ History.written ──→ the next one

An attempt that died before its first save has left nothing here. It lost a start and little more; no interval could help it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from holdfast.policy.preemptions import PreemptionRate

__all__ = ["History"]

_KEY = "history"
_LEAVING, _FINISHED = "leaving", "finished"


@dataclass(frozen=True, slots=True)
class History:
    """As of the start of an attempt."""

    starts: int = 1
    """How many starts of a trainer led here, this one included. Claims count those of commands too, so they say nothing."""
    preemptions: int = 0
    """Attempts that ended before the run did, by whatever took them."""
    noticed: int = 0
    """Of these, those that had a last save."""
    exposure_s: float = 0.0
    """Time in loops, of the attempts before."""
    save_cost_s: float | None = None
    """What one save cost the loop, as measured last."""

    @classmethod
    def after(cls, metadata: Mapping[str, Any], run_id: str) -> History:
        """Of an attempt that goes on from a checkpoint with this metadata; of another run's it takes what a save costs, no more."""
        before = metadata.get(_KEY) or {}
        cost_s = before.get("save_cost_s")
        if before.get("run") != run_id:
            return cls(save_cost_s=cost_s)
        return cls(
            starts=before["starts"] + 1,
            preemptions=before["preemptions"] + (before["end"] != _FINISHED),
            noticed=before["noticed"] + (before["end"] == _LEAVING),
            exposure_s=before["exposure_s"],
            save_cost_s=cost_s,
        )

    def written(
        self, run_id: str | None, elapsed_s: float, save_cost_s: float | None, *, leaves: bool, finishes: bool
    ) -> dict[str, Any]:
        """What a checkpoint of this attempt says; `elapsed_s` in its loop so far."""
        now = replace(self, exposure_s=self.exposure_s + elapsed_s)
        end = _FINISHED if finishes else _LEAVING if leaves else ""
        fields = {
            "run": run_id, "starts": now.starts, "preemptions": now.preemptions, "noticed": now.noticed,
            "exposure_s": now.exposure_s, "save_cost_s": save_cost_s or self.save_cost_s, "end": end,
        }  # fmt: skip
        return {_KEY: fields}

    @property
    def rate(self) -> PreemptionRate:
        return PreemptionRate().observed(self.preemptions, self.exposure_s, self.noticed)
