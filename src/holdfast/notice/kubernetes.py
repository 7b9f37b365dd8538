"""Kubernetes: eviction, a NoExecute taint, a node that shuts down and a deleted pod all arrive as SIGTERM.

The pod is killed `terminationGracePeriodSeconds` after its end was decided. No variable tells a container how long that is, and a
preStop hook has used up its part before the signal, so the user gives the seconds that remain; Kubernetes' default is 30.
"""

from __future__ import annotations

import signal

from holdfast.core.clock import Clock
from holdfast.notice.signals import SignalWatcher

__all__ = ["kubernetes_watcher"]


def kubernetes_watcher(clock: Clock, grace_s: float) -> SignalWatcher:
    """Fed with the process's signals, like any `SignalWatcher`."""
    return SignalWatcher(clock, name="kubernetes", grace_s={signal.SIGTERM: grace_s})
