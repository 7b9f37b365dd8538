"""What the agents of one round tell each other: a TCPStore in the agent of rank 0, and what happens when that agent dies.

torchrun's agent asks it three things: which ranks its workers have (right after the rendezvous), and, when they have finished, how
many others have. An error in the first ends the agent, and its node would be lost with the other; waiting takes minutes. So every
call looks meanwhile whether all agents of the round are still there. When one is gone, calls return, with what lets the agent go
on to its next look at `num_nodes_waiting`: that tells it to form a new round.

Requests are made in threads of their own, because a host that has fallen silent holds them up. None of them waits for a key at the
store: a thread that is still in torch's client when the interpreter ends, and hears that the connection is gone, aborts it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

__all__ = ["RoundLost", "RoundStore"]

_T = TypeVar("_T")
_LOOK_EVERY_S = 1.0
_ASK_EVERY_S = 0.05


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
        self._timeout = timedelta(seconds=300)
        self.is_lost = False
        self.is_under_way = False
        """Before: calls raise RoundLost, and the rendezvous begins anew. After: they return something, see above."""

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    def set_timeout(self, timeout: timedelta) -> None:
        """For how long `get`, `multi_get` and `wait` wait for keys."""
        self._timeout = timeout

    def set(self, key: str, value: str | bytes) -> None:
        self._said = value.encode() if isinstance(value, str) else value
        self._ask(lambda: self._inner.set(key, value), None)

    def get(self, key: str) -> bytes:
        # Read as: the first of these workers is rank 1 of 2. Its master is gone, so they can do nothing before they are stopped.
        return self._ask(lambda: self._inner.get(key), json.dumps([1, 2, 1, 2]).encode(), [key])

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._inner.add(key, amount), 0)

    def wait(self, keys: list[str]) -> None:
        self._ask(lambda: None, None, keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        # Read by rank 0 as: every agent has as many workers as this one.
        return self._ask(lambda: self._inner.multi_get(keys), [self._said] * len(keys), keys)

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self._ask(lambda: self._inner.multi_set(keys, values), None)

    def _ask(self, call: Callable[[], _T], otherwise: _T, keys: list[str] | None = None) -> _T:
        """What `call` returns, once all `keys` are there."""
        error: Exception | None = None
        if not self.is_lost:
            try:
                if keys:
                    self._until_there(keys)
                return self._request(call)
            except (RoundLost, RuntimeError) as raised:  # torch's DistError is a RuntimeError
                error = raised
        self.is_lost = True
        if not self.is_under_way:
            raise RoundLost(f"the round's agents cannot all be reached: {error}") from error
        return otherwise

    def _until_there(self, keys: list[str]) -> None:
        give_up_s = time.monotonic() + self._timeout.total_seconds()
        look_s = time.monotonic() + _LOOK_EVERY_S
        while not self._request(lambda: self._inner.check(keys)):
            now_s = time.monotonic()
            if now_s > give_up_s:
                raise RoundLost(f"nothing was heard of one of them within {self._timeout.total_seconds():g} s")
            if now_s > look_s:
                self._look()
                look_s = now_s + _LOOK_EVERY_S
            time.sleep(_ASK_EVERY_S)

    def _request(self, call: Callable[[], _T]) -> _T:
        future: Future[_T] = Future()
        threading.Thread(target=_run, args=(call, future), name="holdfast-round", daemon=True).start()
        while True:
            try:
                return future.result(_LOOK_EVERY_S)
            except TookTooLong:
                if not future.done():
                    self._look()

    def _look(self) -> None:
        if not self._is_whole():
            raise RoundLost("one of them has gone")


def _run(call: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
