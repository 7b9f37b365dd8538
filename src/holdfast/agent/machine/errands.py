"""What goes on beside the job, in two threads: listening to the controller, and telling it how far this machine is.

    ears:  orders.look() every few seconds
    mouth: words at once, a pulse every half minute

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
def beside(
    listen: Callable[[], None],
    speak: Callable[[], None],
    *,
    has_word: threading.Event,
    listen_s: float,
    speak_s: float,
) -> Iterator[None]:
    """Call both, again and again, until the block is left; `speak` also as soon as `has_word` is set, which it clears. Trouble of
    the store waits for the next time."""
    leaving, never = threading.Event(), threading.Event()

    def again(act: Callable[[], None], every_s: float, woken_by: threading.Event) -> None:
        while not leaving.is_set():
            woken_by.wait(every_s)
            woken_by.clear()
            if leaving.is_set():
                return
            try:
                act()
            except TROUBLE:
                leaving.wait(min(every_s, 1.0))

    threads = [
        threading.Thread(target=again, args=each, name=name, daemon=True)
        for name, *each in (
            ("holdfast-ears", listen, listen_s, never),
            ("holdfast-mouth", speak, speak_s, has_word),
        )
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leaving.set()
        never.set()
        has_word.set()
        for thread in threads:
            thread.join(_CLOSE_S)
