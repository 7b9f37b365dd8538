"""What the kernel says about a death: whether memory ran out.

SIGKILL looks the same from the out-of-memory killer and from a machine that is being taken away; the cgroup's counter tells
them apart. Read before and after an attempt, it rises by the processes that were killed for memory.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["oom_kills"]


def oom_kills(cgroups: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup")) -> int | None:
    """How many processes the kernel has killed for memory in this cgroup (v2) and below; None where that cannot be read."""
    try:
        lines = own_cgroup.read_text().splitlines()
        path = next(line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::"))
        counters = (cgroups / path / "memory.events").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    except (OSError, ValueError, StopIteration, IndexError):
        return None
