"""What goes on beside the job, in two threads: listening to the controller, and telling it how far this machine is.

    ears:  orders.look() every few seconds
    mouth: words as they come, a pulse every half minute

They are two because a store that is slow for one must not hold up the other. What is heard takes effect in the main thread
(`life.Work.look`), which alone may tell the watchdog: when that thread hangs, nothing extends the machine's life.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.agent.machine.records import TROUBLE

__all__ = ["beside"]

_CLOSE_S = 5.0


@contextmanager
def beside(listen: Callable[[], None], speak: Callable[[], None], *, listen_s: float, speak_s: float) -> Iterator[None]:
    """Call both, again and again, until the block is left. Trouble of the store waits for the next time."""
    leaving = threading.Event()

    def again(act: Callable[[], None], every_s: float) -> None:
        while not leaving.wait(every_s):
            try:
                act()
            except TROUBLE:
                continue

    threads = [
        threading.Thread(target=again, args=(act, every_s), name=name, daemon=True)
        for act, every_s, name in ((listen, listen_s, "holdfast-ears"), (speak, speak_s, "holdfast-mouth"))
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leaving.set()
        for thread in threads:
            thread.join(_CLOSE_S)
