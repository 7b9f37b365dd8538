"""How a process is asked from outside what it is doing, also when it hangs: a signal makes it write its Python stacks to a file.

The trainer offers this (`offer_stacks`) where an agent shares a folder with it; the agent asks (`ask_for_stacks`) before it ends a
process that hangs. `faulthandler` writes from inside the signal handler and needs no lock: it works while a thread sits in C
code and never lets go of the interpreter. The signal is a real-time one, because SIGUSR1 and SIGUSR2 belong to launchers and
scripts (Slurm sends USR1 as a notice), and because nothing else in a training process is known to use it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = ["ask_for_stacks", "forget_offers", "offer_stacks", "offers"]

_FILE_PREFIX = "stacks-"
_ABOVE_FIRST = 9
_offered: tuple[Path, IO[bytes]] | None = None


def _signal_number() -> int | None:
    first = getattr(signal, "SIGRTMIN", None)
    return None if first is None or sys.platform != "linux" else int(first) + _ABOVE_FIRST


def offer_stacks(folder: Path) -> bool:
    """From now on the signal makes this process write its stacks into the folder. False where that is not possible: on another
    system than Linux, or where somebody else uses the signal already. Call it from the main thread."""
    global _offered
    number = _signal_number()
    if number is None or threading.current_thread() is not threading.main_thread():
        return False
    path = folder / f"{_FILE_PREFIX}{os.getpid()}"
    if _offered is not None and _offered[0] == path:
        return True
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    try:
        file = path.open("ab", buffering=0)
    except OSError:
        return False
    # Invariant: the registered file stays open, because faulthandler writes to its descriptor.
    faulthandler.register(number, file, all_threads=True, chain=False)
    if _offered is not None:
        _offered[1].close()
    _offered = (path, file)
    return True


def offers(folder: Path) -> list[int]:
    """The living processes that offer their stacks in this folder, ascending."""
    pids = []
    for path in folder.glob(f"{_FILE_PREFIX}*"):
        digits = path.name.removeprefix(_FILE_PREFIX)
        if digits.isdigit() and _catches(int(digits)):
            pids.append(int(digits))
    return sorted(pids)


def forget_offers(folder: Path) -> None:
    """Of processes that have ended: their numbers may come back as somebody else's."""
    for path in folder.glob(f"{_FILE_PREFIX}*"):
        with suppress(OSError):
            path.unlink()


def _catches(pid: int) -> bool:
    """Whether the process has a handler for the signal: without one it would die of it."""
    number = _signal_number()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = next(line for line in lines if line.startswith("SigCgt:")).split()[1]
        return number is not None and bool(int(mask, 16) >> (number - 1) & 1)
    return False


def ask_for_stacks(folder: Path, pid: int) -> Path | None:
    """Ask one process; the stacks are appended to the file that is returned. None when it does not offer them."""
    number = _signal_number()
    if number is None or not _catches(pid):
        return None
    with suppress(OSError):
        os.kill(pid, number)
        return folder / f"{_FILE_PREFIX}{pid}"
    return None
