"""Which machine this is, and since when it is there: by its own timer, which no time server sets.

A grant's lifetime counts from the machine's boot. That is the kernel's own (/proc/uptime), except where several machines of a
rehearsal share a kernel: there the cloud says when each has begun (`core.bootstrap.ENV_MACHINE_BOOT`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.bootstrap import (
    ENV_LOCAL_END,
    ENV_MACHINE_BOOT,
    ENV_MACHINE_BOOT_LIMIT,
    ENV_MACHINE_FOLDER,
    ENV_MACHINE_KIND,
    LOCAL_KIND,
)
from holdfast.core.clock import Clock
from holdfast.core.contract import ENV_MACHINE
from holdfast.core.errors import UsageError

__all__ = ["ThisMachine", "this_machine"]

_UNBORN_S = 900.0
_UPTIME = Path("/proc/uptime")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThisMachine:
    """What does not change while it is there."""

    name: str
    """The provider's, or the boot's where nobody has said one."""
    boot: str
    """Of this start of the machine."""
    boot_s: float
    """On the monotonic clock."""
    unborn_at_s: float
    """Without a grant by then, it ends; on the monotonic clock."""
    folder: Path
    end_command: str | None
    """The only one that may ever be run as its end; None: it ends by leaving."""


def this_machine(
    environment: Mapping[str, str],
    end_command: str | None,
    clock: Clock,
    *,
    uptime: Path = _UPTIME,
    boot_id: Path = _BOOT_ID,
) -> ThisMachine:
    """UsageError for what the environment says wrongly: a machine that does not know since when it is there must not work."""
    kernel = _kernel_boot(boot_id)
    said = environment.get(ENV_MACHINE_BOOT)
    if said is not None:
        try:
            boot_s = float(said)
        except ValueError:
            boot_s = math.nan
        if not -math.inf < boot_s <= clock.monotonic_s():
            raise UsageError(f"{ENV_MACHINE_BOOT} is a moment of the monotonic clock that has passed, not {said!r}")
        boot = f"{kernel}-{boot_s:.3f}"
    else:
        try:
            boot_s = clock.monotonic_s() - float(uptime.read_text().split()[0])
        except (OSError, ValueError, IndexError):
            raise UsageError(
                f"{uptime} does not say since when this machine is there; set {ENV_MACHINE_BOOT}"
            ) from None
        boot = kernel
    is_local = environment.get(ENV_MACHINE_KIND) == LOCAL_KIND
    allowed = not is_local or end_command == environment.get(ENV_LOCAL_END)
    return ThisMachine(
        name=environment.get(ENV_MACHINE) or boot,
        boot=boot,
        boot_s=boot_s,
        unborn_at_s=_unborn_at_s(environment.get(ENV_MACHINE_BOOT_LIMIT), boot_s, clock),
        folder=Path(os.path.abspath(environment.get(ENV_MACHINE_FOLDER) or ".")),
        end_command=(end_command or None) if allowed else None,
    )


def _unborn_at_s(said: str | None, boot_s: float, clock: Clock) -> float:
    """Started by hand, hours after the boot, a machine still gets its quarter of an hour."""
    if said is None:
        return clock.monotonic_s() + _UNBORN_S
    try:
        limit_s = float(said)
    except ValueError:
        limit_s = math.nan
    if not 0 < limit_s < math.inf:
        raise UsageError(f"{ENV_MACHINE_BOOT_LIMIT} is a number of seconds above zero, not {said!r}")
    return boot_s + limit_s


def _kernel_boot(boot_id: Path) -> str:
    try:
        return boot_id.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
