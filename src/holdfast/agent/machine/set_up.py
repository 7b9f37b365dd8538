"""The set-up as a process: watched, in time, and shown to whoever looks at the run's logs, without the secrets.

process → setup.log on this machine → Hider → the run's logs (as it comes), this machine's own output (the end of it)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from holdfast.agent.child import Child
from holdfast.agent.machine.secrets import Hider, hide
from holdfast.agent.machine.unprepared import Unprepared
from holdfast.core.errors import HoldfastError

__all__ = ["run_set_up"]

_LOOK_S = 0.1
_LAST_LINES, _LAST_CHARACTERS = 20, 2000
_READ_BYTES = 1 << 20
_TAIL_BYTES = 256 << 10
"""Of the log; a secret has 64 KiB at most."""


def run_set_up(
    script: tuple[str, ...],
    environment: Mapping[str, str],
    log: Path,
    limit_s: float,
    tick: Callable[[], None],
    secrets: Mapping[str, str],
    keep: Callable[[bytes], None],
) -> tuple[int, str] | None:
    """Exit code and what was said; None: it is set up. The process is a real one, so its time is real too."""
    hider = Hider(secrets)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with os.fdopen(os.open(log, flags, 0o600), "wb") as output, log.open("rb") as written:
        try:
            child = Child(script, environment, stdout=output.fileno(), stderr=output.fileno())
        except HoldfastError as error:
            raise Unprepared(f"the set-up: {error}", 1) from None
        until_s = time.monotonic() + limit_s
        late = False
        try:
            while not child.has_ended() and not late:
                tick()
                time.sleep(_LOOK_S)
                _pass_on(written, hider, keep)
                late = time.monotonic() >= until_s
        finally:
            code = child.reap()
            _pass_on(written, hider, keep)
            keep(hider.pass_on(b"", is_last=True))
    # Enough is looked at that no secret is cut where what is shown begins.
    with log.open("rb") as written:
        written.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        said = hide(written.read(_TAIL_BYTES).decode(errors="replace"), secrets)[-4 * _LAST_CHARACTERS :]
    sys.stderr.write(said)
    if code == 0:
        return None
    last = "\n".join(said.splitlines()[-_LAST_LINES:])[-_LAST_CHARACTERS:]
    how = f"took more than {limit_s:g} s" if late else f"failed with exit code {code}"
    # Codes from 64 on, and of signals, mean something to whoever reads the last word.
    return (code if 0 < code < 64 else 1), f"the set-up {how}: {last}"


def _pass_on(written: BinaryIO, hider: Hider, keep: Callable[[bytes], None]) -> None:
    while data := written.read(_READ_BYTES):
        keep(hider.pass_on(data))
