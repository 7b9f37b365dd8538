"""The threads of a fleet's controller: who hears, who calls the roll, who looks out, and a pool that looks after the runs.

Each is a loop around one method of the `FleetController`, and holds up no other: a provider that answers slowly delays its own
list, a create call that hangs its own run. The main thread only waits, so that Ctrl-C is heard at once; then every step that has
been begun is finished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from holdfast.fleet.fleet_controller import FleetController
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.pace import FleetPace

__all__ = ["run_fleet"]

_LOOK_S = 0.2
_WAIT_S = 1.0
"""A lookout is asked so often whether it has something to do; an idle thread of the pool looks up so often."""


def run_fleet(
    fleet: FleetController,
    is_stopped: Callable[[], bool],
    *,
    pace: FleetPace,
    say: Callable[[str], None],
    workers: int = 16,
    until_empty: bool = False,
) -> None:
    """Until `is_stopped`; with `until_empty` also until no run is left. Returns when every step that was begun is done."""
    leaving = threading.Event()
    crew = _Crew(leaving, say)
    crew.again("roll", fleet.call_roll, pace.roll_s)
    crew.again("inbox", fleet.hear, pace.hear_s)
    crew.again("beat", fleet.beat, pace.beat_s)
    crew.again("tidy", fleet.tidy, pace.beat_s)
    for number in range(workers):
        crew.again(f"work-{number}", partial(fleet.work, _WAIT_S), 0.0)
    watched: set[Lookout] = set()
    try:
        while not is_stopped() and not (until_empty and fleet.is_empty):
            for lookout in set(fleet.lookouts()) - watched:
                watched.add(lookout)
                name = f"{lookout.provider.name}-{len(watched)}"
                crew.again(f"list-{name}", partial(fleet.look_out, lookout), _WAIT_S)
                crew.again(f"prices-{name}", partial(fleet.price, lookout), _WAIT_S)
            leaving.wait(_LOOK_S)
    finally:
        leaving.set()
        fleet.wake()
        crew.join()


class _Crew:
    def __init__(self, leaving: threading.Event, say: Callable[[str], None]) -> None:
        self._leaving, self._say = leaving, say
        self._threads: list[threading.Thread] = []

    def again(self, name: str, act: Callable[[], object], every_s: float) -> None:
        """From beginning to beginning; what takes longer begins anew at once."""
        thread = threading.Thread(target=self._loop, args=(name, act, every_s), name=f"holdfast-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _loop(self, name: str, act: Callable[[], object], every_s: float) -> None:
        pause_s = 0.0
        while not self._leaving.wait(pause_s):
            begun_s = time.monotonic()
            try:
                act()
            except Exception as error:
                self._say(f"{name}: {type(error).__name__}: {error}; going on")
                pause_s = max(every_s, _WAIT_S)
            else:
                pause_s = max(0.0, every_s - (time.monotonic() - begun_s))

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
