"""Python's cycle collector, kept out of the way while thousands of small objects are made that stay.

Each full collection walks everything alive, and making a list of 10,000 entries sets off several: that took longer than all
else that a save of many small tensors does.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection begins inside. For short work that waits for nothing: the pause holds for every thread of the process.

    Where two threads pause at once, the first to leave ends it for both: a lost pause costs time and nothing else.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
