"""What every `Store` must do, as tests: subclass `StoreConformance` in a test module and give it a fixture named `store`.

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self): ...

The fixture yields an empty store. The suite writes up to `big_bytes` at a time and deletes nothing afterwards.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import pytest

from holdfast.core.errors import FormatError, IntegrityError, NotFound, UsageError
from holdfast.store.base import Entry, Store
from holdfast.store.probe import probe_conditional_writes

__all__ = ["StoreConformance"]

_T = TypeVar("_T")

_BAD_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    ".tmp/x",
    "a\\b",
    "a b",
    "a\0b",
    "é",
    "a\n",
    "x" * 901,
)
_BAD_PREFIXES = ("a", "/", "a//", "../", "a/b", ".tmp/")


class StoreConformance:
    """The suite. Class attributes may be lowered for stores that are slow or small."""

    threads = 8
    big_bytes = 64 * 2**20
    listed_objects = 1100
    """More than one page of what the service lists at a time."""

    @pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4096, 3 * 2**20 + 1])
    def test_what_is_put_is_what_is_read(self, store: Store, size_bytes: int) -> None:
        body = _pattern(size_bytes)
        store.put("data/one", body)
        assert store.get("data/one", max_bytes=size_bytes) == body
        into = bytearray(size_bytes)
        store.read_into("data/one", 0, memoryview(into))
        assert into == body
        assert list(store.list()) == [Entry("data/one", size_bytes)]

    def test_a_sequence_of_buffers_becomes_one_object(self, store: Store) -> None:
        parts = [_pattern(700, salt) for salt in range(3000)]
        parts[7] = b""
        views = [memoryview(part) if index % 2 else part for index, part in enumerate(parts)]
        store.put("data/many", views)
        whole = b"".join(parts)
        assert store.get("data/many", max_bytes=len(whole)) == whole
        store.put("data/none", [])
        assert store.get("data/none", max_bytes=0) == b""

    def test_buffers_of_any_shape_are_taken_and_let_go(self, store: Store) -> None:
        with mmap.mmap(-1, 2 * mmap.PAGESIZE) as shared:
            shared[:] = _pattern(len(shared))
            expected = bytes(shared)
            whole = memoryview(shared)
            store.put("shared", [whole[: mmap.PAGESIZE], whole[mmap.PAGESIZE :]])
            # The store keeps neither the bytes (they change now) nor a hold on the memory (it is closed now).
            whole[:] = bytes(len(whole))
            whole.release()
        assert store.get("shared", max_bytes=len(expected)) == expected
        numbers: Any = memoryview(bytearray(_pattern(64))).cast("d", (2, 4))
        store.put("numbers", numbers)
        assert store.get("numbers", max_bytes=64) == _pattern(64)
        with pytest.raises(UsageError):
            store.put("strided", memoryview(_pattern(64))[::2])
        into: Any = memoryview(bytearray(64)).cast("d")
        store.read_into("numbers", 0, into)
        assert into.tobytes() == _pattern(64)

    def test_a_big_object_is_read_whole_and_in_ranges(self, store: Store) -> None:
        body = _pattern(self.big_bytes)
        store.put("data/big", memoryview(body))
        into = bytearray(self.big_bytes)
        store.read_into("data/big", 0, memoryview(into))
        assert into == body
        for offset, length in ((1, 1), (4097, 2**20), (self.big_bytes - 1, 1), (self.big_bytes, 0)):
            part = bytearray(length)
            store.read_into("data/big", offset, memoryview(part))
            assert part == body[offset : offset + length]

    def test_put_replaces_whole_objects(self, store: Store) -> None:
        for body in (b"long " * 1000, b"short", b"short", b""):
            store.put("again", body)
            assert store.get("again", max_bytes=10_000) == body

    def test_put_new_tells_a_free_name_from_a_taken_one(self, store: Store) -> None:
        assert store.put_new("heads/1.json", b"first")
        assert not store.put_new("heads/1.json", b"second")
        assert store.get("heads/1.json", max_bytes=10) == b"first"
        store.delete("heads/1.json")
        assert store.put_new("heads/1.json", b"third")
        assert store.get("heads/1.json", max_bytes=10) == b"third"

    def test_put_new_has_exactly_one_winner(self, store: Store) -> None:
        for number in range(10):
            key = f"heads/{number}.json"
            bodies = [f"writer {index}".encode() * 50 for index in range(self.threads)]
            won = _at_once([_put_new(store, key, body) for body in bodies])
            assert won.count(True) == 1
            assert store.get(key, max_bytes=10_000) == bodies[won.index(True)]

    def test_the_store_passes_the_probe(self, store: Store) -> None:
        probe_conditional_writes(store, "0123456789abcdef01234567")
        assert list(store.list()) == []

    def test_list_is_ascending_by_whole_key(self, store: Store) -> None:
        # "-" and "." sort before "/", "0" after it: folders and their neighbours interleave.
        keys = ["a/b", "a-b", "a.b", "a0", "a/b0", "a/b-c", "a/c/d", "B", "ab/c", "a/b.c", "z/1/2/3", "z/1-2"]
        for key in keys:
            store.put(key, key.encode())
        assert list(store.list()) == [Entry(key, len(key)) for key in sorted(keys)]
        for prefix in ("a/", "a/c/", "z/1/", "ab/", "none/", "a/b/"):
            assert [entry.key for entry in store.list(prefix)] == sorted(key for key in keys if key.startswith(prefix))

    def test_list_goes_beyond_one_page(self, store: Store) -> None:
        keys = [f"events/{number:05d}" for number in range(self.listed_objects)]
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda key: store.put(key, b"x"), keys))
        assert [entry.key for entry in store.list("events/")] == keys

    def test_delete_is_repeatable_and_leaves_the_neighbours(self, store: Store) -> None:
        store.put("a/b/c", b"1")
        store.put("a/b/d", b"2")
        for _ in range(2):
            store.delete("a/b/c")
        store.delete("never/was/here")
        assert [entry.key for entry in store.list()] == ["a/b/d"]
        with pytest.raises(NotFound):
            store.get("a/b/c", max_bytes=10)

    def test_absent_objects_are_not_found(self, store: Store) -> None:
        store.put("a/b", b"1")
        for key in ("absent", "a/absent", "absent/b", "a/b/c"):
            with pytest.raises(NotFound):
                store.get(key, max_bytes=10)
            for length in (0, 1):
                with pytest.raises(NotFound):
                    store.read_into(key, 0, memoryview(bytearray(length)))
        assert list(store.list("absent/")) == []

    def test_get_refuses_more_than_expected(self, store: Store) -> None:
        store.put("ten", b"0123456789")
        assert store.get("ten", max_bytes=10) == b"0123456789"
        with pytest.raises(FormatError):
            store.get("ten", max_bytes=9)

    def test_a_range_beyond_the_end_is_an_integrity_error(self, store: Store) -> None:
        store.put("ten", b"0123456789")
        store.put("empty", b"")
        for offset, length in ((0, 11), (9, 2), (10, 1), (11, 1), (100, 5), (11, 0)):
            with pytest.raises(IntegrityError):
                store.read_into("ten", offset, memoryview(bytearray(length)))
        with pytest.raises(IntegrityError):
            store.read_into("empty", 0, memoryview(bytearray(1)))

    @pytest.mark.parametrize("key", _BAD_KEYS)
    def test_bad_keys_are_refused_by_every_method(self, store: Store, key: str) -> None:
        for attempt in (
            lambda: store.put(key, b"x"),
            lambda: store.put_new(key, b"x"),
            lambda: store.get(key, max_bytes=1),
            lambda: store.read_into(key, 0, memoryview(bytearray(1))),
            lambda: store.delete(key),
        ):
            with pytest.raises(UsageError):
                attempt()
        assert list(store.list()) == []

    @pytest.mark.parametrize("prefix", _BAD_PREFIXES)
    def test_bad_prefixes_are_refused(self, store: Store, prefix: str) -> None:
        with pytest.raises(UsageError):
            store.list(prefix)

    def test_writers_listers_and_deleters_do_not_disturb_each_other(self, store: Store) -> None:
        """Folders come and go under the writers; objects that are not deleted stay, and nothing half-written is seen."""
        body = _pattern(5000)

        def churn(writer: int) -> None:
            for turn in range(25):
                store.put(f"shared/folder/{writer}-{turn}", body)
                assert store.put_new(f"shared/new/{writer}-{turn}", body)
                assert all(entry.size_bytes == len(body) for entry in store.list("shared/"))
                assert store.get(f"shared/folder/{writer}-{turn}", max_bytes=5000) == body
                store.delete(f"shared/folder/{writer}-{turn}")
                if turn % 5:
                    store.delete(f"shared/new/{writer}-{turn}")

        writers = 4
        _at_once([_call(churn, writer) for writer in range(writers)])
        kept = sorted(f"shared/new/{writer}-{turn}" for writer in range(writers) for turn in range(0, 25, 5))
        assert [entry.key for entry in store.list()] == kept


def _pattern(size_bytes: int, salt: int = 0) -> bytes:
    """Bytes in which every position is recognisable: a period that divides no power of two."""
    unit = bytes((salt + 7 * index) % 251 for index in range(251))
    return (unit * (size_bytes // 251 + 1))[:size_bytes]


def _put_new(store: Store, key: str, body: bytes) -> Callable[[], bool]:
    return lambda: store.put_new(key, body)


def _call(function: Callable[[int], None], argument: int) -> Callable[[], None]:
    return lambda: function(argument)


def _at_once(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Results of all calls, each in its own thread, all let go at the same moment."""
    barrier = Barrier(len(calls))

    def run(call: Callable[[], _T]) -> _T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))
