"""The cache of records: right or silent, whatever becomes of its file; and absence is never its word."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest
from fleet_of_worlds import damaged
from fleet_world import World
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.clock import SystemClock
from holdfast.core.ids import seeded_tokens
from holdfast.core.launches import Answer, answer_key, intent_key
from holdfast.core.sealed import seal
from holdfast.fleet.index import Index, index_path
from holdfast.fleet.records import RunRecords
from holdfast.fleet.view import RunView, see
from holdfast.store.memory import MemoryStore


def filled(path: Path, count: int = 300) -> dict[str, bytes]:
    index = Index(path)
    data = {f"key-{i}": os.urandom(50 + 10 * (i % 40)) for i in range(count)}
    for key, body in data.items():
        index.put("run", key, body)
    index.close()
    return data


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    data = filled(tmp_path / "index.sqlite")
    index = Index(tmp_path / "index.sqlite")
    assert all(index.get("run", key) == body for key, body in data.items())
    assert index.get("other run", "key-0") is None
    index.forget("run")
    index.close()
    assert Index(tmp_path / "index.sqlite").get("run", "key-0") is None
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 2**31), length=st.integers(1, 9000), seed=st.integers(0, 99), cut=st.booleans())
def test_a_damaged_file_is_right_or_silent(
    tmp_path_factory: pytest.TempPathFactory, at: int, length: int, seed: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("index") / "index.sqlite"
    data = filled(path, 120)
    body = bytearray(path.read_bytes())
    at %= len(body)
    if cut:
        del body[at:]
    else:
        length = min(length, len(body) - at)
        body[at : at + length] = random.Random(seed).randbytes(length)
    path.write_bytes(body)
    said: list[str] = []
    index = Index(path, say=said.append)
    for key, right in data.items():
        assert index.get("run", key) in (None, right)
        index.put("run", key, right)
    index.close()
    again = Index(path, say=said.append)
    assert all(again.get("run", key) == right for key, right in data.items()), said
    again.close()


def test_rows_in_the_wrong_place_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET key = 'swapped' WHERE key = 'key-1'")
    connection.execute("UPDATE records SET run_id = 'other' WHERE key = 'key-2'")
    connection.commit()
    connection.close()
    index = Index(path)
    assert index.get("run", "swapped") is None
    assert index.get("other", "key-2") is None
    index.close()


def test_a_file_that_was_deleted_replaced_or_damaged_while_it_is_open(tmp_path: Path) -> None:
    path, early = tmp_path / "index.sqlite", tmp_path / "early"
    data = filled(path, 50)
    shutil.copy(path, early)
    for ruin in (path.unlink, lambda: shutil.copy(early, path), lambda: damaged(path)):
        index = Index(path)
        for number in range(700):
            index.put("run", f"more-{number}", b"x" * 200)
        index.flush()
        ruin()
        for key, right in data.items():
            assert index.get("run", key) in (None, right)
        for number in range(700):
            assert index.get("run", f"more-{number}") in (None, b"x" * 200)
        index.put("run", "after", b"y")
        index.close()
        Index(path).close()
        shutil.copy(early, path)
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def test_a_place_that_cannot_be_used_and_a_file_of_somebody_else(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("no folder")
    index = Index(tmp_path / "file" / "index.sqlite", say=said.append)
    index.put("run", "key", b"x")
    assert index.get("run", "key") is None
    index.close()
    assert len(said) == 1
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    index = Index(other, say=said.append)
    index.put("run", "key", b"x")
    assert index.get("run", "key") == b"x"
    index.close()
    assert len(said) == 2
    assert "schema is 99" in said[1]


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    first, second = Index(path), Index(path)
    first.put("run", "a", b"1")
    second.put("run", "b", b"2")
    first.flush()
    second.flush()
    assert (first.get("run", "b"), second.get("run", "a")) == (b"2", b"1")
    first.close()
    second.close()


def test_absence_is_the_stores_word(tmp_path: Path) -> None:
    """A record that is in the index and not in the store's list is not there; one that is damaged in the index is read."""
    store, index = MemoryStore(), Index(tmp_path / "index.sqlite")
    answer = Answer(format=1, launch=1, nonce="n", outcome="void")
    index.put("run", answer_key(1), seal(answer))
    index.put("run", intent_key(2), b"not a record")
    records = RunRecords(store, clock=SystemClock(), tokens=seeded_tokens(1), index=index, run_id="run")
    assert list(records.read()) == []
    store.put_new(answer_key(2), seal(Answer(format=1, launch=2, nonce="n", outcome="failed")))
    index.put("run", answer_key(2), b"not a record")
    (read,) = list(records.read())
    assert (read.launch, read.record) == (2, Answer(format=1, launch=2, nonce="n", outcome="failed"))
    index.close()


def test_a_start_with_an_index_reads_lists_and_pulses_only(tmp_path: Path) -> None:
    """And sees what it would have seen without one."""
    world = World()
    world.play()
    store, views, gets = world.store, [], []
    for index in (None, Index(tmp_path / "i.sqlite"), Index(tmp_path / "i.sqlite")):
        counted: list[str] = []

        class Counting(MemoryStore):
            def get(self, key: str, *, max_bytes: int, counted: list[str] = counted) -> bytes:
                counted.append(key)
                return store.get(key, max_bytes=max_bytes)

        reading = Counting()
        reading._contents = store._contents
        records = RunRecords(reading, clock=world.clock, tokens=seeded_tokens(1), index=index, run_id="run")
        view = RunView()
        for event in records.read():
            view = see(view, event)
        if index is not None:
            index.close()
        views.append(view)
        gets.append(counted)
    assert views[0] == views[1] == views[2]
    assert len(gets[0]) == len(gets[1]) > 5
    assert all(key.endswith("/pulse") for key in gets[2])


def test_each_home_has_its_own() -> None:
    assert index_path("s3://bucket/a") != index_path("s3://bucket/b")
