"""All processes that one start of the command has led to. A launcher's ranks have sessions of their own, which no signal to its
group reaches, and those that it leaves behind have another parent: so they are found by parent, session and a mark they inherit.

    pid, mark → /proc → members → signal_all (told once), kill_all (stopped first, so that none gets away or is started meanwhile)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["MARK", "has_launched_ranks", "kill_all", "members", "signal_all"]

MARK = "HOLDFAST_DRILL"
"""Environment variable with a value of its own for each start."""
_GONE = "ZX"


class _Seen(NamedTuple):
    parent: int
    session: int
    lives: bool


def members(root: int, mark: str | None = None) -> list[int]:
    """Living processes: the root first, then in the order in which their numbers were given. Where there is no /proc, the root."""
    seen = _processes()
    if not seen:
        return [root]
    # What is left of a family whose root is gone is found by the mark.
    found = {root} | ({pid for pid in seen if f"{MARK}={mark}" in _environment(pid)} if mark else set())
    while more := {
        pid for pid, each in seen.items() if pid not in found and (each.parent in found or each.session in found)
    }:
        found |= more
    living = (pid for pid in found if pid in seen and seen[pid].lives and pid != os.getpid())
    return sorted(living, key=lambda pid: (pid != root, pid))


def signal_all(root: int, number: int) -> None:
    """To its group at once, as a terminal does, and then to those outside of it."""
    others = [pid for pid in members(root) if not _is_in_group(pid, root)]
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(root, number)
    _send(others, number)


def kill_all(root: int, mark: str | None = None) -> None:
    """SIGKILL. A parent that is stopped starts nothing, and notices nothing of its children's end."""
    stopped: set[int] = set()
    while new := set(members(root, mark)) - stopped:
        _send(sorted(new), signal.SIGSTOP)
        stopped |= new
    _send(stopped, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(root, signal.SIGKILL)


def has_launched_ranks(pid: int) -> bool:
    """Whether the training is not this process but one that it has started as rank 0."""
    return "RANK=0" not in _environment(pid) and any("RANK=0" in _environment(each) for each in members(pid))


def _is_in_group(pid: int, leader: int) -> bool:
    with suppress(OSError):
        return os.getpgid(pid) == leader
    return False


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _processes() -> dict[int, _Seen]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        # It may end while it is looked at. The name, in parentheses, may hold anything.
        with suppress(OSError):
            state, parent, _, session = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            found[int(entry.name)] = _Seen(int(parent), int(session), state not in _GONE)
    return found


def _environment(pid: int) -> frozenset[str]:
    """As it was when its program was started; empty where that cannot be read."""
    with suppress(OSError):
        return frozenset(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    return frozenset()
