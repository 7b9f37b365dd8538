"""What the agents of one round tell each other: a TCPStore in the agent of rank 0, and what happens when that agent dies.

torchrun's agent asks it three things: which ranks its workers have (right after the rendezvous), and, when they have finished, how
many others have. An error in the first ends the agent, and its node would be lost with the other; waiting takes minutes. So every
call waits in a thread of its own, and looks meanwhile whether all agents of the round are still there. When one is gone, calls
return, with what lets the agent go on to its next look at `num_nodes_waiting`: that tells it to form a new round.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

__all__ = ["RoundLost", "RoundStore"]

_T = TypeVar("_T")
_LOOK_EVERY_S = 1.0


class RoundLost(RendezvousConnectionError):
    """An agent of the round has gone, or that of rank 0 cannot be reached, before the round was under way."""


class RoundStore:
    """The part of torch's Store that agents use. Thread safety: none, it belongs to the agent's thread.

    inner: the store in rank 0's agent, a torch.distributed.Store (whose annotations lack half of it).
    is_whole: whether all agents of the round are still there.
    """

    def __init__(self, inner: Any, is_whole: Callable[[], bool]) -> None:
        self._inner, self._is_whole = inner, is_whole
        self._said = b""
        self.is_lost = False
        self.is_under_way = False
        """Before: calls raise RoundLost, and the rendezvous begins anew. After: they return something, see above."""

    @property
    def timeout(self) -> timedelta:
        found: timedelta = self._inner.timeout
        return found

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)

    def set(self, key: str, value: str | bytes) -> None:
        self._said = value.encode() if isinstance(value, str) else value
        self._ask(lambda: self._inner.set(key, value), None)

    def get(self, key: str) -> bytes:
        # Read as: the first of these workers is rank 1 of 2. Its master is gone, so they can do nothing before they are stopped.
        return self._ask(lambda: self._inner.get(key), json.dumps([1, 2, 1, 2]).encode())

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._inner.add(key, amount), 0)

    def wait(self, keys: list[str]) -> None:
        self._ask(lambda: self._inner.wait(keys), None)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        # Read by rank 0 as: every agent has as many workers as this one.
        return self._ask(lambda: self._inner.multi_get(keys), [self._said] * len(keys))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self._ask(lambda: self._inner.multi_set(keys, values), None)

    def _ask(self, call: Callable[[], _T], otherwise: _T) -> _T:
        error: Exception | None = None
        if not self.is_lost:
            future: Future[_T] = Future()
            threading.Thread(target=_run, args=(call, future), name="holdfast-round", daemon=True).start()
            try:
                return self._answer(future)
            except (RoundLost, RuntimeError) as raised:  # torch's DistError is a RuntimeError
                error = raised
        self.is_lost = True
        if not self.is_under_way:
            raise RoundLost(f"the round's agents cannot all be reached: {error}") from error
        return otherwise

    def _answer(self, future: Future[_T]) -> _T:
        while True:
            try:
                return future.result(_LOOK_EVERY_S)
            except TookTooLong:
                if not future.done() and not self._is_whole():
                    raise RoundLost("one of them has gone") from None


def _run(call: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
