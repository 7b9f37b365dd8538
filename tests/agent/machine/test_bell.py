"""Word in the fleet's inbox: one object for each word, nobody waits for it, and what fails is said once."""

from __future__ import annotations

import threading

from holdfast.agent.machine.bell import Bell
from holdfast.agent.machine.records import Records
from holdfast.agent.machine.words import Words
from holdfast.core.errors import PermissionDenied, StoreUnavailable
from holdfast.core.fleet_home import parse_news
from holdfast.store.base import Body
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock


def test_every_word_that_is_written_is_rung_once() -> None:
    """Also those from before the machine knew where."""
    home, store, clock = MemoryStore(), MemoryStore(), ManualClock()
    bell = Bell(7, lambda url: home, print)
    words = Words(Records(store), 7, "m", 0.0, clock, bell.ring)
    words.say("notice", notice="preemption")
    words.send()
    assert not list(home.list())
    bell.hang("memory://home", "run-a")
    words.say("claimed", attempt=1)
    words.say("released", exit_code=0)
    words.send()
    bell.close(60)
    keys = [entry.key for entry in home.list()]
    assert keys == [f"inbox/run-a.00000007.{part:06d}" for part in range(3)]
    assert all(parse_news(key) == ("run-a", "word") for key in keys)
    assert all(entry.size_bytes == 0 for entry in home.list())


def test_a_word_that_was_not_written_is_not_rung() -> None:
    class Away(MemoryStore):
        def put_new(self, key: str, body: bytes) -> bool:
            raise StoreUnavailable("away")

    home, rung = MemoryStore(), list[int]()
    words = Words(Records(Away()), 1, "m", 0.0, ManualClock(), rung.append)
    words.say("ready")
    try:
        words.send()
    except StoreUnavailable:
        pass
    assert not rung
    assert not list(home.list())


def test_nobody_waits_and_what_fails_is_said_once() -> None:
    stuck, go, said = threading.Event(), threading.Event(), list[str]()

    class Forbidden(MemoryStore):
        def put(self, key: str, body: Body) -> None:
            stuck.set()
            assert go.wait(60)
            raise PermissionDenied("403")

    bell = Bell(1, lambda url: Forbidden(), said.append)
    bell.hang("memory://home", "run-a")
    for part in range(5):
        bell.ring(part)
    assert stuck.wait(60)
    bell.close(0.0)
    assert not said
    go.set()
    bell.close(60)
    assert len(said) == 1
    assert "memory://home" in said[0]
    assert "403" in said[0]


def test_without_a_fleet_there_is_no_thread() -> None:
    def opened(url: str) -> MemoryStore:
        raise AssertionError("nobody has named a home")

    bell = Bell(1, opened, print)
    bell.hang("", "run-a")
    bell.ring(0)
    bell.close(1)
