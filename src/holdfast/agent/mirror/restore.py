"""From a checkpoint into the folder: written beside it, every byte verified, then renamed into place.

Whoever is killed on the way leaves a folder that nobody looks at (`.holdfast-restore-…`), and which the next restore removes.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from holdfast.agent.mirror.folder import OWN_PREFIX
from holdfast.agent.mirror.state import FolderState
from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.format import CHUNK_BYTES
from holdfast.checkpoint.read import CheckpointReader, Target
from holdfast.core.errors import RestoreError

__all__ = ["clear_leftovers", "put_back", "restore_whole", "set_aside", "set_torn_aside"]

_BATCH_BYTES = 64 << 20
"""How much is read at once, so that memory stays bounded whatever the files' sizes."""


def _staging_folder(root: Path, token: str) -> Path:
    """Beside the folder, so that a rename suffices; inside where the folder is a file system of its own."""
    if os.path.ismount(root):
        return root / f"{OWN_PREFIX}-restore-{token}"
    return root.parent / f"{OWN_PREFIX}-restore-{root.name}-{token}"


def clear_leftovers(root: Path) -> None:
    """Remove what interrupted restores have left."""
    beside = glob.escape(f"{OWN_PREFIX}-restore-{root.name}-") + "*"
    for leftover in (*root.glob(f"{OWN_PREFIX}-restore-*"), *root.parent.glob(beside)):
        shutil.rmtree(leftover, ignore_errors=True)


def restore_whole(
    root: Path, state: FolderState, reader: CheckpointReader, pool: ThreadPoolExecutor, token: str,
    make_way: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Make `root` what the state says; `make_way` is called when all is verified, and leaves it absent or empty.

    Raises IntegrityError, NotFound, RestoreError (no space, …).
    """
    staging = _staging_folder(root, token)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _write(staging, state, set(state.files) | set(state.links), reader, pool)
        make_way()
        if os.path.ismount(root):
            _move_entries(staging, root)
        else:
            os.rename(staging, root)
    except OSError as error:
        raise RestoreError(_failed(root, error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_back(
    root: Path, units: Collection[str], state: FolderState, members: Collection[str], reader: CheckpointReader,
    pool: ThreadPoolExecutor, token: str,
) -> None:  # fmt: skip
    """Put these units of the state (their files and links are `members`) into a folder that is in use by nobody."""
    staging = _staging_folder(root, token)
    try:
        _write(staging, state, members, reader, pool)
        for unit in sorted(units):
            if os.path.lexists(staging / unit):
                (root / unit).parent.mkdir(parents=True, exist_ok=True)
                os.rename(staging / unit, root / unit)
    except OSError as error:
        raise RestoreError(_failed(root, error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def set_aside(root: Path) -> Path:
    """Move the folder's whole content out of the way, under a name that is free. Returns where to."""
    if not os.path.ismount(root):
        aside = _free(root.parent, f"{root.name}{OWN_PREFIX}-kept")
        os.rename(root, aside)
        return aside
    aside = _free(root, f"{OWN_PREFIX}-kept")
    aside.mkdir()
    for entry in os.listdir(root):
        if not entry.startswith(OWN_PREFIX):
            os.rename(root / entry, aside / entry)
    return aside


def set_torn_aside(root: Path, units: Collection[str]) -> Path:
    """Move what a killed command has left half written out of its way. Only the last such leftovers are kept. Returns where to."""
    aside = root / f"{OWN_PREFIX}-torn" if os.path.ismount(root) else root.parent / f"{OWN_PREFIX}-torn-{root.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for unit in sorted(units):
        (aside / unit).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(root / unit, aside / unit)
    return aside


def _free(folder: Path, name: str) -> Path:
    number = 1
    while os.path.lexists(folder / f"{name}-{number}"):
        number += 1
    return folder / f"{name}-{number}"


def _move_entries(staging: Path, root: Path) -> None:
    for entry in sorted(os.listdir(staging)):
        os.rename(staging / entry, root / entry)


def _failed(root: Path, error: OSError) -> str:
    return (
        f"the mirrored folder {root} cannot be restored: {error.strerror or error}. What it held before is still there"
    )


def _write(
    staging: Path, state: FolderState, members: Collection[str], reader: CheckpointReader, pool: ThreadPoolExecutor
) -> None:
    staging.mkdir()
    for path in sorted(members):
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
    files = [path for path in members if path in state.files]
    for path in files:
        with open(staging / path, "xb") as file:
            # Space is claimed before anything is fetched: a full disk shows at once.
            if state.files[path].size_bytes:
                os.posix_fallocate(file.fileno(), 0, state.files[path].size_bytes)
    for batch in _batches(files, state, reader):
        buffers = [memoryview(bytearray(length)) for _, _, _, length in batch]
        reader.read(
            [Target(stored, to, start_byte=start) for (_, stored, start, _), to in zip(batch, buffers, strict=True)],
            pool,
        )
        for (path, _, start, _), data in zip(batch, buffers, strict=True):
            with open(staging / path, "r+b") as file:
                file.seek(start)
                file.write(data)
    for path in members:
        if path in state.links:
            os.symlink(state.links[path], staging / path)
    for path in files:
        note = state.files[path]
        os.chmod(staging / path, note.mode)
        os.utime(staging / path, ns=(note.mtime_ns, note.mtime_ns))
    for folder in sorted(state.folders, reverse=True):
        if (staging / folder).is_dir():
            os.chmod(staging / folder, state.folders[folder])


def _batches(
    files: list[str], state: FolderState, reader: CheckpointReader
) -> Iterator[list[tuple[str, Assembled, int, int]]]:
    """Files in order, each a piece after the other: the path, the stored file, where the piece begins, and its length."""
    batch: list[tuple[str, Assembled, int, int]] = []
    size_bytes = 0
    for path in files:
        stored = reader.arrays[state.files[path].array]
        for start in range(0, stored.nbytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, stored.nbytes - start)
            if batch and size_bytes + length > _BATCH_BYTES:
                yield batch
                batch, size_bytes = [], 0
            batch.append((path, stored, start, length))
            size_bytes += length
    if batch:
        yield batch
