"""What a caller asks of the saver, and what it is told of the outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.tree import FlatTree, Leaf
from holdfast.core.errors import PassedOver, SaveError

__all__ = ["SaveHandle", "SaveRequest", "SaveState"]


class SaveState(Enum):
    """Where a save is."""

    HELD = "held"
    WAITING = "waiting"
    WRITING = "writing"
    STAGED = "staged"
    """On the machine's disk, on its way to the store."""
    COMMITTED = "committed"
    SUPERSEDED = "superseded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What a save is of. `deferrable` tells arrays that only optimizers write (None: there are none). `finish` makes it
    the run's last. `ranks`: among whom the state was shared out."""

    flat: FlatTree
    step: int
    epoch: int
    metadata: dict[str, Any]
    reason: str
    deferrable: Callable[[Leaf], bool] | None
    finish: bool = False
    ranks: tuple[int, ...] = (0,)


class SaveHandle:
    """One save, as its caller sees it. Thread-safe."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state = SaveState.WAITING
        self._done = threading.Event()
        self._checkpoint: CheckpointRef | None = None
        self._error: BaseException | None = None
        self._successor: SaveHandle | None = None

    def done(self) -> bool:
        """True when the outcome is known (committed, failed, or its successor's is)."""
        if self._successor is not None:
            return self._successor.done()
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> CheckpointRef:
        """Block until this state, or a newer one that replaced it while it waited, is durable and committed.

        Raises SaveError (or Fenced) when it was not, TimeoutError when `timeout_s` passed first.
        """
        handle = self
        while True:
            if not handle._done.wait(timeout_s):
                raise TimeoutError(f"the save of step {self.step} is still {handle.state.value}")
            if handle._successor is None:
                break
            handle = handle._successor
        if handle._error is not None:
            raise handle._error
        if handle._checkpoint is None:
            raise SaveError(f"the save of step {self.step} was given up before it was written")
        return handle._checkpoint

    @property
    def failed(self) -> bool:
        """Whether this state is lost, and nothing newer has taken its place."""
        return self.state is SaveState.FAILED and not isinstance(self._error, PassedOver)

    def finish(
        self, state: SaveState, checkpoint: CheckpointRef | None = None, error: BaseException | None = None
    ) -> None:
        """Called by the saver, once: this is what became of it."""
        self.state, self._checkpoint, self._error = state, checkpoint, error
        self._done.set()

    def supersede(self, successor: SaveHandle) -> None:
        """Called by the saver: a newer save has taken this one's place before it was written."""
        self.state, self._successor = SaveState.SUPERSEDED, successor
        self._done.set()
