"""Tells the fleet's home that this machine has said something, so that its controller need not ask every run all the time.

    word written → ring(part) → a thread of its own → an empty object, whose name says all: inbox/<run_id>.<launch>.<part>

Nothing depends on it: a controller that hears nothing reads what was written a little later. So it delays nobody, is not
tried again by itself, and its failure is said once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from holdfast.agent.machine.records import TROUBLE
from holdfast.core.fleet_home import word_news_key
from holdfast.store.base import Store

__all__ = ["Bell"]


class Bell:
    """Thread safety: `ring` from any thread; `hang` and `close` from one."""

    def __init__(self, launch: int, open_store: Callable[[str], Store], say: Callable[[str], None]) -> None:
        self._launch, self._open_store, self._say = launch, open_store, say
        self._parts: SimpleQueue[int | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def hang(self, home: str, run_id: str) -> None:
        """Where it is heard; empty: nowhere. What was rung before is heard then."""
        if home and self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(home, run_id), name="holdfast-bell", daemon=True)
            self._thread.start()

    def ring(self, part: int) -> None:
        self._parts.put(part)

    def close(self, wait_s: float) -> None:
        """What was rung may take so long to be heard."""
        self._parts.put(None)
        if self._thread is not None:
            self._thread.join(wait_s)

    def _work(self, home: str, run_id: str) -> None:
        store, failed = None, False
        try:
            while (part := self._parts.get()) is not None:
                try:
                    store = store or self._open_store(home)
                    store.put(word_news_key(run_id, self._launch, part), b"")
                except TROUBLE as error:
                    if not failed:
                        said = " ".join(str(error).split())
                        self._say(
                            f"holdfast: word cannot be left at {home}: {said}. The controller hears of this machine later"
                        )
                    failed = True
        finally:
            if store is not None:
                store.close()
