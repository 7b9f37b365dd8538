"""How much memory there is, how it is divided, and that forked children do not get a copy of it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from holdfast.checkpoint.staging import Slot, available_memory_bytes, plan_slots
from holdfast.core.errors import UsageError

_GIB = 1 << 30
_PAGE = mmap.PAGESIZE


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _meminfo(available_bytes: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available_bytes // 1024} kB\n"}


def test_without_cgroups_the_machine_decides(tmp_path: Path) -> None:
    _write(tmp_path, _meminfo(3 * _GIB))
    assert available_memory_bytes(tmp_path) == 3 * _GIB


def test_nothing_readable_limits_nothing(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) >= 1 << 50
    _write(tmp_path, {"proc/meminfo": "garbage\n", "proc/self/cgroup": "garbage\n\n7\n0::\n"})
    assert available_memory_bytes(tmp_path) >= 1 << 50


@pytest.mark.parametrize("where", ["sys/fs/cgroup/pod/box", "sys/fs/cgroup/pod", "sys/fs/cgroup"])
def test_version_2_limits_at_any_level(tmp_path: Path, where: str) -> None:
    """Page cache can be given back, shared memory cannot."""
    _write(
        tmp_path,
        _meminfo(64 * _GIB)
        | {
            "proc/self/cgroup": "0::/pod/box\n",
            f"{where}/memory.max": f"{8 * _GIB}\n",
            f"{where}/memory.current": f"{5 * _GIB}\n",
            f"{where}/memory.stat": f"anon 1\nfile {3 * _GIB}\nshmem {_GIB}\n",
        },
    )
    assert available_memory_bytes(tmp_path) == 5 * _GIB


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    _write(tmp_path, _meminfo(64 * _GIB) | {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"})
    assert available_memory_bytes(tmp_path) == 64 * _GIB


def test_a_limit_counts_although_the_rest_cannot_be_read(tmp_path: Path) -> None:
    _write(
        tmp_path,
        _meminfo(64 * _GIB)
        | {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": str(4 * _GIB),
            "sys/fs/cgroup/a/memory.current": str(_GIB),
        },
    )
    assert available_memory_bytes(tmp_path) == 3 * _GIB


def test_version_1(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/docker/x"
    _write(
        tmp_path,
        _meminfo(64 * _GIB)
        | {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n",
            f"{base}/memory.limit_in_bytes": str(10 * _GIB),
            f"{base}/memory.usage_in_bytes": str(9 * _GIB),
            f"{base}/memory.stat": f"cache 1\nshmem 1\ntotal_cache {4 * _GIB}\ntotal_shmem {2 * _GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert available_memory_bytes(tmp_path) == 3 * _GIB


def test_inside_a_container_the_mount_itself_counts(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/kubepods/burstable/pod1/box\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * _GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * _GIB),
        },
    )
    assert available_memory_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("snapshot", "cap", "available", "ranks", "slots"),
    [
        (_GIB, None, 100 * _GIB, 1, 2),
        (_GIB, None, 5 * _GIB, 1, 2),
        (_GIB, None, 4 * _GIB, 1, 1),
        (_GIB, None, 2 * _GIB, 1, 0),
        (_GIB, None, 40 * _GIB, 8, 2),
        (_GIB, None, 30 * _GIB, 8, 1),
        (_GIB, None, 0, 1, 0),
        (_GIB, 16 * _GIB, 100 * _GIB, 1, 2),
        (_GIB, 16 * _GIB, 100 * _GIB, 16, 1),
        (_GIB, 2 * _GIB - 1, 100 * _GIB, 1, 1),
        (_GIB, _GIB - 1, 100 * _GIB, 1, 0),
        (_GIB, 0, 100 * _GIB, 1, 0),
        (_GIB, 100 * _GIB, _GIB, 1, 1),
        (0, None, _GIB, 1, 2),
    ],
)
def test_slots(snapshot: int, cap: int | None, available: int, ranks: int, slots: int) -> None:
    budget = plan_slots(snapshot, cap_bytes=cap, available_bytes=available, local_ranks=ranks)
    assert budget.slots == slots
    assert budget.slot_bytes >= snapshot
    assert budget.slot_bytes % _PAGE == 0
    assert ranks * budget.slots * budget.slot_bytes <= (available if cap is None else min(cap, available))


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        plan_slots(1, cap_bytes=-1, available_bytes=_GIB, local_ranks=1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_does_not_inherit_a_slot() -> None:
    slot = Slot(1 << 20)
    assert "holdfast-staging" in Path("/proc/self/maps").read_text()
    child = os.fork()
    if child == 0:
        os._exit(int("holdfast-staging" in Path("/proc/self/maps").read_text()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    slot.memory[:5] = b"alive"
    slot.close()
    assert "holdfast-staging" not in Path("/proc/self/maps").read_text()


def test_a_slot_is_resident_before_it_is_used_and_closes_under_a_view() -> None:
    slot = Slot(64 * _PAGE)
    slot.fault_in()
    lines = Path("/proc/self/smaps").read_text().split("holdfast-staging")[1].splitlines()
    resident_kb = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    assert resident_kb * 1024 == 64 * _PAGE
    view = slot.memory[10:20]
    slot.close()
    view[:] = b"0123456789"
    assert bytes(view) == b"0123456789"
