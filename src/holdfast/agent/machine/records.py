"""Sealed records in the store, as a machine reads and writes them: nothing is believed that does not verify, no outcome is guessed.

    read → a record, or None: confirmed absent        put → True: this very record is there, False: others were first
    anything else raises, and is tried again later: `TROUBLE`

A store that throttles or cannot be reached never ends a machine; it never lets one live longer either, because moments come from
the machine's own timer, and the watchdog, which looks at them, waits for no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, HoldfastError, RunConflict
from holdfast.core.launches import parse_key
from holdfast.core.sealed import seal
from holdfast.store.base import Store
from holdfast.store.records import read_record, write_record

__all__ = ["TROUBLE", "Records", "patiently"]

TROUBLE = (HoldfastError, OSError)
"""What a store, a network or an altered object can do. Asking again may help, and harms nobody."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)

_Record = TypeVar("_Record", bound=msgspec.Struct)
_T = TypeVar("_T")


class Records:
    """Thread safety: every method, as the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def is_near(self) -> bool:
        """Whether requests cost nothing."""
        return self._store.is_near

    def read(self, key: str, kind: type[_Record]) -> _Record | None:
        """None: confirmed absent."""
        return read_record(self._store, key, kind)

    def put(self, key: str, record: msgspec.Struct) -> bool:
        """Write once; whether this very record is there. Raises StoreUnavailable while the outcome is unknown; the same record is
        put again then."""
        return write_record(self._store, key, record) == record

    def replace(self, key: str, record: msgspec.Struct) -> None:
        """Overwrite: for the pulse, on which nothing depends."""
        self._store.put(key, seal(record))

    def parts(self, folder: str) -> list[tuple[str, int, int, str]]:
        """Kind, launch, part and key of every record of `core.launches` below this folder."""
        found = [(parse_key(entry.key), entry.key) for entry in self._store.list(folder)]
        return [(*parsed, key) for parsed, key in found if parsed is not None]


def patiently(ask: Callable[[], _T], tick: Callable[[], None], clock: Clock) -> _T:
    """Ask until there is an answer. `tick` is called before each try and raises when there is no time left. Fenced and RunConflict
    are answers."""
    failures = 0
    while True:
        tick()
        try:
            return ask()
        except (Fenced, RunConflict):
            raise
        except TROUBLE:
            pause_s = _PAUSES_S[min(failures, len(_PAUSES_S) - 1)]
            failures += 1
            until_s = clock.monotonic_s() + pause_s
            while (left_s := until_s - clock.monotonic_s()) > 0:
                tick()
                clock.sleep(min(1.0, left_s))
