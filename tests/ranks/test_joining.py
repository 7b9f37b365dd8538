"""Finding rank 0 through a store that a launcher keeps while it starts workers again, as torch's c10d rendezvous does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest
from torch.distributed import HashStore
from waiting import eventually

from holdfast.core.clock import Clock
from holdfast.core.errors import RanksApart
from holdfast.testing.clock import ManualClock
from holdfast.train.ranks import world as worlds
from holdfast.train.ranks.joining import join
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.world import World, publish, whereabouts

ENVIRON = {"MASTER_ADDR": "127.0.0.1"}


class TriedClock(ManualClock):
    """Says when somebody waits to try again."""

    def __init__(self, again: Callable[[], None]) -> None:
        super().__init__()
        self._again = again

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._again()


@pytest.fixture
def dead_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the rank 0 of before was: nobody listens there, and the store still says it."""
    store = HashStore()
    monkeypatch.setattr(worlds, "_group_store", lambda: store)
    # Both ranks are this process here: neither opens one run more than the other.
    monkeypatch.setattr("holdfast.train.ranks.joining.next_run", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = int(gone.getsockname()[1])
    publish("127.0.0.1", port, "of-before")
    return port


def joined(rank: int, clock: Clock) -> Together:
    return join(World(rank, 2), ENVIRON, clock, lambda notice: None, commit_timeout_s=60.0)


def test_a_member_asks_again_until_the_new_rank_0_has_said_where_it_is(dead_port: int) -> None:
    chairs: list[Together] = []

    def chair() -> None:
        chairs.append(joined(0, ManualClock()))

    coming = threading.Thread(target=chair)
    tried = 0

    def again() -> None:
        nonlocal tried
        tried += 1
        if tried == 3:
            coming.start()
            eventually(lambda: whereabouts()[2] != "of-before")

    member = joined(1, TriedClock(again))
    coming.join(60)
    assert tried >= 3
    assert len(chairs) == 1
    member.close()
    chairs[0].close()


def test_a_rank_0_that_never_comes_is_named(dead_port: int) -> None:
    clock = ManualClock()
    with pytest.raises(RanksApart, match=rf"rank 0 cannot be reached at 127\.0\.0\.1, port {dead_port}"):
        joined(1, clock)
    assert sum(clock.slept_s) == pytest.approx(120, abs=1)
