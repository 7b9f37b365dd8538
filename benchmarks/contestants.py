"""What is compared, behind one small interface: save, wait until durable, restore into a live state. holdfast, and the floor.

A save includes making the state dict, since that is what a training script does. Durable means the same for all: the bytes have
been through fsync.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from states import State, named_tensors

import holdfast

__all__ = ["DONE", "Contestant", "Holdfast", "Pending", "RawFile"]

_PIECE_BYTES = 64 << 20


class Pending(Protocol):
    """A save that has begun."""

    def gate(self) -> None:
        """Called before the optimizer writes; returns when it may."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Return when the checkpoint is durable. Raises when it is not."""


class Contestant:
    """One way to save and restore, in a folder of its own. Every save goes to a new place; `tidy` removes the one before it."""

    name = ""
    restores_into_moments = False
    """Whether it needs AdamW's moments to exist before it restores. Those that do are spared the allocation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    @property
    def path(self) -> Path:
        """Where the newest checkpoint is."""
        return self.folder / str(self.number)

    def next_path(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number += 1
        return self.path

    def begin(self, state: State) -> None:
        """Whatever is done once, before the first save."""

    def save(self, state: State) -> Pending:
        raise NotImplementedError

    def end_saving(self) -> None:
        """Between the last save and the first restore."""

    def restore(self, target: State) -> None:
        raise NotImplementedError

    def after_restore(self) -> None:
        """Let go of what a restore leaves open. Not timed."""

    def objects(self) -> dict[str, int]:
        """Everything below the folder, with sizes in bytes. What is removed meanwhile is left out."""
        sizes = {}
        for root, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    sizes[f"{root}/{name}"] = os.stat(f"{root}/{name}").st_size
        return sizes

    def cache_files(self, *, wanted: bool) -> None:
        """Have the files lie in the page cache, or none of them: whoever wrote them, and whichever way. Not timed."""
        for path in self.objects():
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                os.fsync(file.fileno())
                if not wanted:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while wanted and file.read(_PIECE_BYTES):
                    pass

    def tidy(self) -> None:
        """Remove what the newest checkpoint has replaced. Not timed."""
        old = self.folder / str(self.number - 1)
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of memory and threads; the newest checkpoint stays."""


class _Done:
    def gate(self) -> None:
        return None

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


DONE = _Done()


class RawFile(Contestant):
    """No format at all: the same bytes, one after the other, into one file with fsync. The floor."""

    name = "raw file"
    restores_into_moments = True

    def save(self, state: State) -> Pending:
        with open(self.next_path(), "wb", buffering=0) as file:
            for buffer in _buffers(state):
                while len(buffer):
                    buffer = buffer[file.write(buffer[:_PIECE_BYTES]) :]
            os.fsync(file.fileno())
        return DONE

    def restore(self, target: State) -> None:
        with open(self.path, "rb", buffering=0) as file:
            for buffer in _buffers(target):
                while len(buffer):
                    buffer = buffer[file.readinto(buffer) or 0 :]


def _buffers(state: State) -> Iterator[memoryview]:
    for tensor in named_tensors(state.tree()).values():
        yield tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class Holdfast(Contestant):
    """`holdfast.Run`, hashing on. Old checkpoints are removed by the run itself, after the save."""

    name = "holdfast"

    def __init__(self, folder: Path, url: str | None = None, store_options: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self._url, self._store_options = url or str(folder), store_options
        self._run: holdfast.Run | None = None

    def _open(self, state: State) -> holdfast.Run:
        run = holdfast.Run(self._url, save_every="1000000 steps", keep=1, store_options=self._store_options)
        run.track(model=state.model, optimizer=state.optimizer)
        run.restore()
        return run

    def begin(self, state: State) -> None:
        self._run = self._open(state)

    def save(self, state: State) -> Pending:
        assert self._run is not None
        return _Handle(self._run.save())

    def end_saving(self) -> None:
        self.close()  # a restore claims the run

    def restore(self, target: State) -> None:
        self._run = self._open(target)

    def after_restore(self) -> None:
        self.close()

    def tidy(self) -> None:
        """Wait until the run has removed what the newest checkpoint replaced: it does so in the background, right after a save."""
        before, now = None, self.objects()
        while now != before:
            time.sleep(0.1)
            before, now = now, self.objects()

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None


class _Handle:
    def __init__(self, handle: holdfast.SaveHandle) -> None:
        self._handle = handle

    def gate(self) -> None:
        """holdfast waits by itself, in a hook of the optimizer: what it costs shows in the step."""

    def done(self) -> bool:
        return self._handle.done()

    def wait(self) -> None:
        self._handle.wait()
