"""What a person wants to see first in the output of a machine that has just started: which machine, which attempt, from where.

holdfast: attempt 3 of s3://bucket/runs/gpt (start 1 of this agent)
holdfast:   machine     ip-10-0-0-7, 8 CPUs, memory 61.4 GiB
holdfast:   GPU         1 x NVIDIA H100 80GB HBM3 80 GiB
holdfast:   price       spot, $1.20 per hour; stops after 8 h
holdfast:   checkpoint  resumes from step 1200
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.config import format_bytes
from holdfast.core.contract import ENV_MARKET, ENV_PRICE

__all__ = ["Startup", "describe_machine", "describe_price", "startup_lines"]

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """What is known when the command is about to start. None where it is not."""

    start: int
    url: str | None
    attempt: int | None
    checkpoint: str | None
    machine: str
    gpus: str | None
    price: str | None
    limit: str | None


def startup_lines(startup: Startup) -> list[str]:
    """The block above; lines about which nothing is known are left out."""
    what = (
        f"attempt {startup.attempt} of {startup.url}" if startup.attempt and startup.url else f"start {startup.start}"
    )
    if startup.attempt and startup.url:
        what += f" (start {startup.start} of this agent)"
    elif startup.url:
        what += f" of {startup.url}"
    price = "; ".join(part for part in (startup.price, startup.limit) if part)
    rows = (
        ("machine", startup.machine),
        ("GPU", startup.gpus),
        ("price", price or None),
        ("checkpoint", startup.checkpoint),
    )
    return [f"holdfast: {what}", *(f"holdfast:   {name:<11} {text}" for name, text in rows if text)]


def describe_machine(cgroups: Path = _CGROUP, own_cgroup: Path = _OWN_CGROUP) -> str:
    """Name, CPUs and memory, as far as this process may use them."""
    cpus = _cpus(cgroups, own_cgroup)
    memory_bytes = _memory_bytes(cgroups, own_cgroup)
    parts = [platform.node() or "unnamed", f"{cpus:g} CPU{'' if cpus == 1 else 's'}"]
    if memory_bytes is not None:
        parts.append(f"memory {format_bytes(memory_bytes)}")
    return ", ".join(parts)


def describe_price(environment: Mapping[str, str]) -> str | None:
    """Market and price, where the launcher or the user has said them."""
    price = environment.get(ENV_PRICE)
    parts = [environment.get(ENV_MARKET), f"${price} per hour" if price else None]
    return ", ".join(part for part in parts if part) or None


def _cpus(cgroups: Path, own_cgroup: Path) -> float:
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _own_folders(cgroups, own_cgroup):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                cpus = min(cpus, int(quota) / int(period))
    return round(cpus, 1)


def _memory_bytes(cgroups: Path, own_cgroup: Path) -> int | None:
    limits = []
    with suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder in _own_folders(cgroups, own_cgroup):
        with suppress(OSError, ValueError):
            limits.append(int((folder / "memory.max").read_text()))
    return min(limits, default=None)


def _own_folders(cgroups: Path, own_cgroup: Path) -> list[Path]:
    """This process's cgroup (v2) and all above it: the tightest limit holds."""
    try:
        lines = own_cgroup.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = cgroups / own
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(cgroups))]
