"""From the job's record to a command that can be started: code, secrets, set-up, environment, script.

The set-up runs once on a machine; a second time only when the first has failed, since networks do. Its output goes where the
machine's own goes; of one that has failed the end is shown to whoever reads the records, without the secrets' values.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.agent.machine.code import fetch_code
from holdfast.agent.machine.mounts import bring, put_aside
from holdfast.agent.machine.records import patiently
from holdfast.agent.machine.secrets import resolve
from holdfast.agent.machine.set_up import run_set_up
from holdfast.agent.machine.setup_cache import SetupCache
from holdfast.agent.machine.unprepared import Unprepared
from holdfast.core.bootstrap import ENV_LOCAL_END
from holdfast.core.clock import Clock
from holdfast.core.contract import ENV_MACHINE
from holdfast.core.errors import HoldfastError
from holdfast.core.job_record import JobRecord
from holdfast.store.base import Store

__all__ = ["Prepared", "Unprepared", "prepare"]

_TRIES = 2
_BETWEEN_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A command, ready to be started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    setup_s: float
    setup_cached: bool = False
    """It was not run here, but taken as another machine has left it."""


def prepare(
    job: JobRecord,
    store: Store,
    folder: Path,
    environment: Mapping[str, str],
    tick: Callable[[], None],
    clock: Clock,
    *,
    keep: Callable[[bytes], None] = lambda data: None,
    say: Callable[[str], None],
) -> Prepared:
    """Make this machine ready. `tick` is called every moment, and raises when it is no longer wanted; what runs is killed then.
    `keep` gets what the set-up writes, without the secrets, and never blocks.

    Raises Unprepared for what another try on this machine would not mend.
    """
    base = {name: value for name, value in environment.items() if name != ENV_LOCAL_END}
    if job.uses_venv:
        base |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', os.defpath)}"}
        base |= {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
    work = folder / "work"
    put_aside(folder)
    _several(lambda: fetch_code(job.code, store, work, base), "the working folder", tick, clock)
    bring(job.mounts, store, folder, base, tick, say=lambda line: say(f"holdfast: file_mounts: {line}"))
    secrets: dict[str, str] = {}
    for name, reference in job.secrets.items():
        _several(
            lambda name=name, reference=reference: secrets.update({name: resolve(name, reference, base)}),  # type: ignore[misc]
            f"secret {name}", tick, clock,
        )  # fmt: skip
    ready = base | job.envs | secrets
    started_s = clock.monotonic_s()
    is_cached = False
    if job.setup.strip():
        cache = None
        if job.setup_cache:
            name = environment.get(ENV_MACHINE) or "another machine"
            cache = SetupCache(job, store, folder, base, machine=name, clock=clock, tick=tick, say=say)
        is_cached = cache is not None and cache.restore()
        if not is_cached:
            _set_up(job, folder, ready, secrets, tick, clock, keep, cache)
    return Prepared(
        command=_script(folder / "run.sh", work, job.run),
        environment=ready,
        setup_s=clock.monotonic_s() - started_s,
        setup_cached=is_cached,
    )


def _set_up(
    job: JobRecord,
    folder: Path,
    environment: Mapping[str, str],
    secrets: Mapping[str, str],
    tick: Callable[[], None],
    clock: Clock,
    keep: Callable[[bytes], None],
    cache: SetupCache | None,
) -> None:
    if cache is not None:
        cache.look_around()
    script = _script(folder / "setup.sh", folder / "work", job.setup)
    for tries_left in reversed(range(_TRIES)):
        failed = run_set_up(script, environment, folder / "setup.log", job.setup_limit_s, tick, secrets, keep)
        if failed is None:
            break
        if not tries_left:
            raise Unprepared(failed[1], failed[0])
        _wait(_BETWEEN_S, tick, clock)
    if cache is not None:
        cache.keep(secrets)


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


def _wait(seconds: float, tick: Callable[[], None], clock: Clock) -> None:
    until_s = clock.monotonic_s() + seconds
    while (left_s := until_s - clock.monotonic_s()) > 0:
        tick()
        clock.sleep(min(1.0, left_s))
