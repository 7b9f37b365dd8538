"""Ranks as Lightning starts them: `strategy="ddp"` begins with one process, which starts the others by itself.

It says less to them than torchrun does, and watches over them: when one ends with an error, it kills all. A rank that leaves
because of a notice is none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from holdfast.core.contract import EXIT_INTERRUPTED, EXIT_PREEMPTED

__all__ = ["as_launched"]

_LOCAL_SIZE = "LOCAL_WORLD_SIZE"
_OBSERVER = "child-process-observer"


@contextmanager
def as_launched(trainer: Any) -> Iterator[None]:
    """Say what torchrun would have said, until the block is left."""
    says = trainer.world_size > 1 and _LOCAL_SIZE not in os.environ
    if says:
        os.environ[_LOCAL_SIZE] = str(trainer.num_devices)
    _let_ranks_leave()
    try:
        yield
    finally:
        if says:
            os.environ.pop(_LOCAL_SIZE, None)


def _let_ranks_leave() -> None:
    """For good: the ranks end when this block is long left."""
    for thread in threading.enumerate():
        if thread.name == _OBSERVER and "_run" not in vars(thread):
            watched: Any = thread
            watched._run = _Look(getattr(watched, "_child_processes", []), watched._run)


class _Look:
    """One look at the other ranks: True when there is nothing left to watch."""

    def __init__(self, children: list[Any], original: Any) -> None:
        self._children, self._original = children, original

    def __call__(self) -> bool:
        if any(child.poll() in (EXIT_PREEMPTED, EXIT_INTERRUPTED) for child in self._children):
            return True
        return bool(self._original())
