"""Whether this node is going: its agent hears the notices that its workers hear, and does not bring it back into the job.

All workers of a job leave together when one machine has got a notice. torchrun's agents take that for a failure and form a new
round, also with the machine that has a minute left; it would go in the middle of that round.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from holdfast.core.clock import Clock
from holdfast.notice.base import Notice, NoticeKind
from holdfast.train.hearing import Hearing

__all__ = ["Departure"]

logger = logging.getLogger(__name__)


class Departure:
    """Thread safety: every method. Raises UsageError for a $HOLDFAST_NOTICE that is wrongly written."""

    def __init__(self, environ: Mapping[str, str], clock: Clock) -> None:
        self._clock = clock
        self._standing: dict[str, Notice] = {}
        self._lock = threading.Lock()
        self._hearing = Hearing(None, clock, _ignore, logger.info)
        self._hearing.start(environ, self._heard)

    @property
    def is_near(self) -> bool:
        """A notice with a deadline stands. Advice is none, and what has passed without anything happening neither."""
        with self._lock:
            return any((notice.left_s(self._clock.unix_s()) or 0.0) > 0.0 for notice in self._standing.values())

    def close(self) -> None:
        self._hearing.close()

    def _heard(self, notice: Notice) -> None:
        with self._lock:
            if notice.kind is NoticeKind.WITHDRAWN:
                self._standing.pop(notice.id, None)
            else:
                self._standing[notice.id] = notice


def _ignore(name: str, **fields: Any) -> None:
    """The workers' ledger has these events."""
