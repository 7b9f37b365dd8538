"""A copy of the user's DataLoader that behaves like it and takes its batches, seeds and workers' habits from holdfast.

Two copies, because a subclass may look at its own attributes while it iterates. The *face* is what is iterated: the user's
class with the user's dataset, samplers and attributes. When its `__iter__` asks for a fetching iterator, the iterator is made
from the *engine*, whose dataset, sampler and collate function are holdfast's. The user's own loader is never changed. Both
copies live as long as the run, so `persistent_workers` works.

`DataLoader.__setattr__` forbids to replace these parts once it is built, so they are set through `__dict__` (holds for torch 2.4 to
2.13, whose iterators are all made by `_get_iterator`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_start_method, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader

from holdfast.data.seeds import derive_seed
from holdfast.train.accelerate import check_loader, is_from_accelerate
from holdfast.train.sample_seeds import IsolatedRandomness, WorkerStart

__all__ = ["LoaderTwin", "deafen", "unwrapped"]

_STOCK_MODULES = ("torch.utils.data.dataloader", "torchdata.stateful_dataloader.stateful_dataloader")


def unwrapped(loader: Any) -> Any:
    """The DataLoader that does the work: accelerate's wrappers keep it in `base_dataloader` and only pretend to be one."""
    while isinstance(base := vars(loader).get("base_dataloader"), DataLoader):
        loader = base
    return loader


def _copy(loader: Any, **parts: Any) -> Any:
    """A shallow copy by hand: classes that customise pickling (accelerate's do) break `copy.copy`."""
    twin = object.__new__(type(loader))
    twin.__dict__.update(vars(loader), **parts)
    return twin


class LoaderTwin:
    """`parts` replace the engine's attributes (dataset, collate_fn, sampler or batch_sampler)."""

    def __init__(self, loader: Any, seed: int, parts: dict[str, Any]) -> None:
        if is_from_accelerate(loader):
            check_loader(loader)
        base = unwrapped(loader)
        fixed: dict[str, Any] = {"generator": torch.Generator(), "_iterator": None}
        if "in_order" in vars(base):
            fixed["in_order"] = True
        if "_initial_iter_for_state_dict" in vars(base):
            # Somebody (accelerate) has asked torchdata's loader for its state, for which it made an iterator of its own.
            fixed["_initial_iter_for_state_dict"] = False
        self._engine = _Engine(_copy(base, **fixed, **parts, worker_init_fn=WorkerStart(base.worker_init_fn)), seed)
        self._base = _copy(base, **fixed, _get_iterator=self._engine.iterator)
        self.face = self._rewrap(loader)
        self.stock = self.face is self._base and type(self.face).__iter__.__module__ in _STOCK_MODULES

    def fetch_by(self, fetch: Callable[[Iterator[Any]], Any]) -> None:
        """Take each batch of the loader by `fetch`, also those that a face reads ahead of what it has yielded."""
        self._engine.fetch = fetch

    def _rewrap(self, loader: Any) -> Any:
        inner = vars(loader).get("base_dataloader")
        return _copy(loader, base_dataloader=self._rewrap(inner)) if isinstance(inner, DataLoader) else self._base

    def open(self, epoch: int) -> Iterator[Any]:
        """Begin a pass. Draws nothing from the global generators."""
        self._engine.epoch = epoch
        with IsolatedRandomness():
            if callable(getattr(self.face, "set_epoch", None)):
                self.face.set_epoch(epoch)
            return iter(self.face)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For torchdata's loader, which keeps the state until it makes its next iterator: here, the engine makes it."""
        self.face.load_state_dict(state)
        self._engine.loader.__dict__["next_iter_state"] = vars(self._base)["next_iter_state"]
        self._base.__dict__["next_iter_state"] = None


class _Engine:
    """Makes the fetching iterators. Must not refer back to the face: the face keeps the iterator of persistent workers, and one
    that is collected as part of a cycle finds its queues already gone and waits five seconds for each worker."""

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader, self.epoch = loader, 0
        self.fetch: Callable[[Iterator[Any]], Any] | None = None
        self._seed = seed

    def iterator(self) -> Any:
        # The seeds of worker processes are drawn from the loader's generator, which is otherwise the global one.
        self.loader.generator.manual_seed(derive_seed(self._seed, "workers", self.epoch))
        made = self.loader._get_iterator() if self.loader.num_workers == 0 else _with_deaf_workers(self.loader)
        return made if self.fetch is None else _Fetched(made, self.fetch)


class _Fetched:
    """A fetching iterator, each of whose batches is taken by `fetch`; whatever else is asked of it, it answers."""

    def __init__(self, inner: Iterator[Any], fetch: Callable[[Iterator[Any]], Any]) -> None:
        self._inner, self._fetch = inner, fetch

    def __iter__(self) -> _Fetched:
        return self

    def __next__(self) -> Any:
        return self._fetch(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def deafen(loader: Any) -> None:
    """Let the workers of a loader that somebody else iterates (an evaluation's) outlive the signals that are the main process's
    business. Changes the loader; nothing that it yields."""
    base = unwrapped(loader)
    if base.num_workers and "_get_iterator" not in vars(base):
        engine = _copy(base, worker_init_fn=WorkerStart(base.worker_init_fn))
        base.__dict__["_get_iterator"] = lambda: _with_deaf_workers(engine)


def _with_deaf_workers(loader: Any) -> Any:
    """Start the workers with SIGTERM, SIGINT and SIGUSR1 blocked until `WorkerStart` has seen to them, so that there is no moment
    at which a signal to the process group kills a worker. A forkserver that is started here stays blocked as well, and lives on for
    its workers."""
    context = loader.multiprocessing_context
    if (context.get_start_method() if context is not None else get_start_method()) != "fork":
        # Starting the tracker would unblock the signals behind our back.
        resource_tracker.ensure_running()
    loader.worker_init_fn.main_pid = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    try:
        iterator = loader._get_iterator()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for worker in getattr(iterator, "_workers", ()):
        # multiprocessing ends daemons with SIGTERM at exit and waits for them: for ever, since they ignore it.
        worker._popen.terminate = worker._popen.kill
    return iterator
