"""From the job's record to a command that can be started: code, secrets, set-up, environment, script.

The set-up runs once on a machine; a second time only when the first has failed, since networks do. Its output goes where the
machine's own goes; of one that has failed the end is shown to whoever reads the records, without the secrets' values.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.agent.child import Child
from holdfast.agent.machine.code import fetch_code
from holdfast.agent.machine.records import patiently
from holdfast.agent.machine.secrets import hide, resolve
from holdfast.core.bootstrap import ENV_LOCAL_END
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError
from holdfast.core.job_record import JobRecord
from holdfast.store.base import Store

__all__ = ["Prepared", "Unprepared", "prepare"]

_TRIES = 2
_BETWEEN_S = 3.0
_LOOK_S = 0.1
_LAST_LINES, _LAST_CHARACTERS = 20, 2000


class Unprepared(HoldfastError):
    """The machine cannot be made ready for this job. `exit_code` goes into its last word."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A command, ready to be started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    setup_s: float


def prepare(
    job: JobRecord, store: Store, folder: Path, environment: Mapping[str, str], tick: Callable[[], None], clock: Clock
) -> Prepared:
    """Make this machine ready. `tick` is called every moment, and raises when it is no longer wanted; what runs is killed then.

    Raises Unprepared for what another try on this machine would not mend.
    """
    base = {name: value for name, value in environment.items() if name != ENV_LOCAL_END}
    if job.uses_venv:
        base |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', os.defpath)}"}
        base |= {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
    work = folder / "work"
    _several(lambda: fetch_code(job.code, store, work, base), "the working folder", tick, clock)
    secrets: dict[str, str] = {}
    for name, reference in job.secrets.items():
        _several(
            lambda name=name, reference=reference: secrets.update({name: resolve(name, reference, base)}),  # type: ignore[misc]
            f"secret {name}", tick, clock,
        )  # fmt: skip
    ready = base | job.envs | secrets
    started_s = clock.monotonic_s()
    if job.setup.strip():
        script = _script(folder / "setup.sh", work, job.setup)
        for tries_left in reversed(range(_TRIES)):
            failed = _set_up(script, ready, folder / "setup.log", job.setup_limit_s, tick)
            if failed is None:
                break
            if not tries_left:
                raise Unprepared(hide(failed[1], secrets), failed[0])
            _wait(_BETWEEN_S, tick, clock)
    return Prepared(
        command=_script(folder / "run.sh", work, job.run),
        environment=ready,
        setup_s=clock.monotonic_s() - started_s,
    )


def _several(act: Callable[[], object], what: str, tick: Callable[[], None], clock: Clock) -> None:
    """Stores and networks are asked again until the machine is no longer wanted; after a few tries it is not they that fail."""
    tries = 0

    def ask() -> None:
        nonlocal tries
        tries += 1
        try:
            act()
        except (HoldfastError, OSError) as error:
            if tries >= 6:
                raise _GivenUp(f"{what}: {' '.join(str(error).split())}") from None
            raise

    try:
        patiently(ask, tick, clock)
    except _GivenUp as error:
        raise Unprepared(str(error), 1) from None


class _GivenUp(Exception):
    """Not one of ours: `patiently` would ask again."""


def _script(path: Path, work: Path, text: str) -> tuple[str, ...]:
    """In a file: the text would stand in every list of processes."""
    path.write_text(f"cd {shlex.quote(str(work))}\n{text}\n", encoding="utf-8")
    path.chmod(0o700)
    return "bash", "-e", "-o", "pipefail", str(path)


def _set_up(
    script: tuple[str, ...], environment: Mapping[str, str], log: Path, limit_s: float, tick: Callable[[], None]
) -> tuple[int, str] | None:
    """Exit code and what was said; None: it is set up. The process is a real one, so its time is real too."""
    with log.open("wb") as output:
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
                late = time.monotonic() >= until_s
        finally:
            code = child.reap()
    said = log.read_bytes()[-4 * _LAST_CHARACTERS :].decode(errors="replace")
    sys.stderr.write(said)
    if code == 0:
        return None
    last = "\n".join(said.splitlines()[-_LAST_LINES:])[-_LAST_CHARACTERS:]
    how = f"took more than {limit_s:g} s" if late else f"failed with exit code {code}"
    # Codes from 64 on, and of signals, mean something to whoever reads the last word.
    return (code if 0 < code < 64 else 1), f"the set-up {how}: {last}"


def _wait(seconds: float, tick: Callable[[], None], clock: Clock) -> None:
    until_s = clock.monotonic_s() + seconds
    while (left_s := until_s - clock.monotonic_s()) > 0:
        tick()
        clock.sleep(min(1.0, left_s))
