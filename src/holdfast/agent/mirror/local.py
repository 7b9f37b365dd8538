"""What this machine remembers of a mirrored folder: which state it last equalled, and which files were seen complete.

The memory is one small file beside the folder. It lets the next agent on this machine tell work that is complete and newer than
the store's from what a killed script has left half written. It is a help, not a truth: without it, times decide.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from holdfast.agent.mirror.folder import OWN_PREFIX, Signature

__all__ = ["Memory", "memory_path", "recall", "remember"]


class Memory(msgspec.Struct, frozen=True):
    """`checkpoint` is the name of the newest state that this folder has taken part in; `complete` maps a path to its signature."""

    run_id: str
    checkpoint: str
    complete: dict[str, Signature]
    changed_alone: list[str] = []
    """Files that have changed by themselves from one state to the next."""


def memory_path(root: Path) -> Path:
    return root.parent / f"{OWN_PREFIX}-mirror-{root.name}.json"


def recall(root: Path) -> Memory | None:
    try:
        read = msgspec.json.decode(memory_path(root).read_bytes(), type=Memory)
        return _with_names(read, lambda name: name.encode("latin-1").decode("utf-8", "surrogateescape"))
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None


def remember(root: Path, memory: Memory) -> None:
    """Best effort: a folder beside which nothing can be written costs the memory only."""
    path = memory_path(root)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        # File names are bytes, which need not be text; JSON is text.
        plain = _with_names(memory, lambda name: name.encode("utf-8", "surrogateescape").decode("latin-1"))
        beside.write_bytes(msgspec.json.encode(plain))
        os.replace(beside, path)


def _with_names(memory: Memory, convert: Callable[[str], str]) -> Memory:
    complete = {convert(path): signature for path, signature in memory.complete.items()}
    return msgspec.structs.replace(
        memory, complete=complete, changed_alone=[convert(path) for path in memory.changed_alone]
    )
