"""torch's RendezvousBackend over the journal: the token is the version's number.

    torch's state machine ── pickle, in this process only ── JobState ── Journal

A call to the store takes no longer than `patience_s` here, whatever the client below does: an agent that waits for minutes in a
read sees neither its workers fail nor the others leave.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from datetime import datetime, timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend

from holdfast.core.errors import HoldfastError, IntegrityError, RunConflict
from holdfast.train.elastic.journal import Journal
from holdfast.train.elastic.state import JobState, Page, from_torch, into_torch

__all__ = ["ObjectStoreBackend"]

_T = TypeVar("_T")


class ObjectStoreBackend(RendezvousBackend):
    """Thread safety: every method. Raises RendezvousConnectionError and RendezvousStateError, and nothing of ours: torch's
    heartbeat thread would end at any other."""

    def __init__(self, journal: Journal, *, patience_s: float) -> None:
        self._journal = journal
        self._calls = _OneAtATime(patience_s)

    @property
    def name(self) -> str:
        return "holdfast"

    def get_state(self) -> tuple[bytes, int] | None:
        page = self._call(self._journal.newest)
        return None if page is None else (_pickled(page), page.number)

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, int, bool] | None:
        record = from_torch(pickle.loads(state))
        page, won = self._call(lambda: self._journal.write(token, record))
        return None if page is None else (_pickled(page), page.number, won)

    def begin(self, now: datetime, dead_after: timedelta) -> JobState:
        """Start a new life of the job if nobody of the old one is there any more, closed or not. Returns the state as it is now.

        Its number of rounds goes on, so that nobody who sleeps takes a round of the new life for one of his.
        """
        while True:
            page = self._call(self._journal.newest)
            if page is None:
                return JobState()
            old = page.state
            if any(node.heard is not None and node.heard >= now - dead_after for node in old.nodes):
                return old
            fresh = JobState(round=old.round + 1, first_round=old.round + 1)
            _, won = self._call(partial(self._journal.write, page.number, fresh))
            if won:
                return fresh

    def _call(self, ask: Callable[[], _T]) -> _T:
        try:
            return self._calls.run(ask)
        except (IntegrityError, RunConflict) as error:
            raise RendezvousStateError(f"the rendezvous' record cannot be used: {error}") from error
        except HoldfastError as error:
            raise RendezvousConnectionError(f"the rendezvous' store does not answer: {error}") from error


def _pickled(page: Page) -> bytes:
    return pickle.dumps(into_torch(page.state))


class _OneAtATime:
    """Runs calls in a thread of its own. One that does not come back in time goes on there, and the next ones wait behind it."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="holdfast-rendezvous", daemon=True)
        self._lock = threading.Lock()

    def run(self, call: Callable[[], _T]) -> _T:
        with self._lock:
            if not self._thread.is_alive():
                self._thread.start()
        future: Future[_T] = Future()
        self._waiting.put((call, future))
        try:
            return future.result(self._patience_s)
        except TookTooLong:
            future.cancel()
            raise RendezvousConnectionError(
                f"the rendezvous' store has not answered within {self._patience_s:g} s"
            ) from None

    def _serve(self) -> None:
        while True:
            call, future = self._waiting.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
