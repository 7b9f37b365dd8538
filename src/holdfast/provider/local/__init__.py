"""The rehearsal cloud as a provider: its client. The cloud itself is `holdfast.testing.cloud`, a process of its own.

`client.py` is `Instances` over HTTP, `billing.py` what a machine has cost, `starting.py` finds or starts the cloud of a folder,
`clock.py` is the clock by which that cloud bills, `wire.py` what both sides say to each other. The cloud reads `wire.py` too, so
the names below are loaded when they are used: it needs no HTTP client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.provider.local.client import LocalCloud
    from holdfast.provider.local.clock import CloudClock

__all__ = ["CloudClock", "LocalCloud"]

_MODULES = {"LocalCloud": "client", "CloudClock": "clock"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
