"""Threads that hash and send, and that never keep a process from ending.

The standard pool is joined when the interpreter exits: a store that hangs would hold a process that was told to leave until the
machine is taken away. What a thread here is doing when the process ends is an upload that no head names, so nothing is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

__all__ = ["DaemonPool"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Task = tuple[Future[Any], Callable[[], Any]]


class DaemonPool(Executor):
    """An executor of a fixed number of daemon threads. Thread-safe. What is submitted after `shutdown` raises RuntimeError."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, fn: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        future: Future[_Result] = Future()
        # Invariant: no task stands behind the words that end the threads; whoever waited for it would wait for ever.
        with self._lock:
            if self._ended:
                raise RuntimeError("this saver is closed, or was given up while its store did not answer")
            self._tasks.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            if cancel_futures:
                self._cancel_waiting()
            if not self._ended:
                self._ended = True
                for _ in self._threads:
                    self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _cancel_waiting(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            if task is None:
                # Shut down before, without cancelling: the threads still need this word.
                self._ended = False
                continue
            task[0].cancel()
            task[0].set_running_or_notify_cancel()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # A thread that waits for work must not keep the last one's memory alive.
            del task, future, call
