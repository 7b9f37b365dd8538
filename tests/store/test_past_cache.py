"""Large bodies that lie on page boundaries go past the page cache. Whatever the disk says to that, the file holds the bytes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.core.errors import StoreUnavailable
from holdfast.store import LocalStore
from holdfast.store.base import PAGE_BYTES

_MEMORY_BYTES = 3 << 20
_PAGES = _MEMORY_BYTES // PAGE_BYTES
_memory = mmap.mmap(-1, _MEMORY_BYTES)
_memory.write(os.urandom(1 << 16) * (_MEMORY_BYTES >> 16))
_WRITEV = os.writev


@dataclass
class _Disk:
    """`os.writev` with the moods of a disk: by number of the call, how much it takes or what it says."""

    moods: Sequence[int | OSError]
    calls: int = 0
    direct_bytes: int = 0

    def writev(self, descriptor: int, buffers: Sequence[memoryview]) -> int:
        mood = self.moods[self.calls] if self.calls < len(self.moods) else _MEMORY_BYTES
        self.calls += 1
        is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if isinstance(mood, OSError):
            if mood.errno == errno.EINVAL and not is_direct:
                return _WRITEV(descriptor, buffers)
            raise mood
        taken = memoryview(b"".join(buffers))[: max(1, mood)]
        if is_direct and len(taken) % PAGE_BYTES:
            # A disk that is full in the middle of a page: what was written so far stays, the flag does not matter for that.
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            count = _WRITEV(descriptor, [taken])
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
            return count
        if is_direct:
            count = _WRITEV(descriptor, buffers) if mood >= _MEMORY_BYTES else _WRITEV(descriptor, _aligned_copy(taken))
            self.direct_bytes += count
            return count
        return _WRITEV(descriptor, [taken])


def _aligned_copy(data: memoryview) -> list[memoryview]:
    copy = mmap.mmap(-1, len(data))
    copy.write(data)
    return [memoryview(copy)]


_paged = st.tuples(st.integers(0, _PAGES - 1), st.integers(1, _PAGES)).map(
    lambda place: (place[0] * PAGE_BYTES, min(place[1], _PAGES - place[0]) * PAGE_BYTES)
)
_odd = st.tuples(st.integers(0, _MEMORY_BYTES - 1), st.integers(0, 9000)).map(
    lambda place: (place[0], min(place[1], _MEMORY_BYTES - place[0]))
)
_bodies = st.lists(_paged, max_size=3).flatmap(
    lambda paged: st.lists(st.one_of(_odd, _paged), max_size=3).map(lambda rest: [*paged, *rest])
)
_moods = st.lists(
    st.one_of(st.integers(1, _MEMORY_BYTES), st.just(OSError(errno.EINVAL, "Invalid argument"))), max_size=4
)


@given(places=_bodies, moods=_moods)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_disk_takes_the_object_holds_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: list[tuple[int, int]], moods: list[int | OSError]
) -> None:
    body = [memoryview(_memory)[start : start + length] for start, length in places]
    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", _Disk(moods).writev)
        store.put("data/x", body)
    assert store.get("data/x", max_bytes=1 << 30) == b"".join(body)
    store.delete("data/x")
    store.close()


def test_pages_go_directly_and_the_rest_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = _Disk([])
    monkeypatch.setattr(os, "writev", disk.writev)
    store = LocalStore(tmp_path)
    whole = memoryview(_memory)[: 2 << 20]
    store.put("data/x", [whole, b"and a tail", whole])
    assert disk.direct_bytes == (len(whole) if _takes_direct_writes(tmp_path) else 0)
    assert store.get("data/x", max_bytes=1 << 30) == b"".join([whole, b"and a tail", whole])
    store.close()


def test_a_failing_disk_fails_the_put_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", _Disk([1 << 20, OSError(errno.EIO, "Input/output error")]).writev)
        with pytest.raises(StoreUnavailable, match="Input/output"):
            store.put("data/x", memoryview(_memory))
    assert list(store.list()) == []
    store.close()


def _takes_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True
