"""How long this machine may work: of all grants the longest holds, and becomes moments on the machine's own timer. Pure.

boot ──────────────── lifetime ──────────── + grace of the grant
     command told ↑ early enough for its own grace │ killed ↑ │ agent killed ↑, the machine's end
"""

from __future__ import annotations

import math

from holdfast.agent.watchdog import Limits
from holdfast.core.launches import GrantRecord

__all__ = ["limits_of", "longer"]

_LEAVING_S = 25.0
"""Beside the command's grace: what it leaves behind is told to end, logs are sent, the last word is said."""
_AGENT_S = 20.0
"""From the order to leave until an agent that hangs is killed; a quarter of the grant's grace where that is short."""


def longer(one: GrantRecord | None, other: GrantRecord) -> GrantRecord:
    """The grant that holds, in whatever order they are heard. Of two as long as each other the later part, to be definite."""
    return other if one is None or (other.lifetime_s, other.part) > (one.lifetime_s, one.part) else one


def limits_of(grant: GrantRecord, boot_s: float, command_grace_s: float) -> Limits:
    """The command has half of the lifetime at least, however short that is: a machine that only saves is of no use.

    Invariant: with the same command, a longer grant gives no earlier moment.
    """
    end_s = boot_s + grant.lifetime_s + grant.grace_s
    kill_s = end_s - min(_AGENT_S, grant.grace_s / 4)
    need_s = command_grace_s + _LEAVING_S
    stop_s = max(boot_s + grant.lifetime_s / 2, min(boot_s + grant.lifetime_s, kill_s - need_s))
    if not math.isfinite(end_s):
        return Limits()
    return Limits(stop_at_s=stop_s, kill_at_s=max(stop_s, kill_s), end_at_s=end_s)
