"""The records of one run in its store, from the controller's side: read as events, written once, won or lost.

A put that fails says nothing by itself, and one that is refused may have been our own first try: what stands there is read back,
and the nonce tells. Records never change, so each is read once; pulses are read anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, StoreUnavailable
from holdfast.core.ids import TokenSource
from holdfast.core.launches import (
    CANCEL_KEY,
    Answer,
    Cancel,
    Command,
    Ended,
    GrantRecord,
    Holder,
    Intent,
    MachineWord,
    Pulse,
    parse_key,
)
from holdfast.fleet.view import Read, Record
from holdfast.store.base import Store
from holdfast.store.records import read_record, write_record

__all__ = ["PREFIXES", "WORDS", "RunRecords"]

_KINDS: dict[str, type[Record]] = {
    "intent": Intent, "answer": Answer, "ended": Ended, "grant": GrantRecord, "command": Command, "holder": Holder,
    "word": MachineWord, "pulse": Pulse, "cancel": Cancel,
}  # fmt: skip
WORDS = ("machines/",)
PREFIXES = (*WORDS, "control/", "launches/")
"""What machines say first: an older list of theirs never makes a later record of a controller look alone."""
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_Nonced = TypeVar("_Nonced", Intent, Answer, Ended, GrantRecord, Command, Cancel)


class RunRecords:
    """Thread safety: none; the controller's one thread."""

    def __init__(self, store: Store, *, clock: Clock, tokens: TokenSource) -> None:
        self._store, self._clock, self._tokens = store, clock, tokens
        self._known: set[str] = set()
        self._over: set[int] = set()
        self.altered: dict[str, str] = {}
        """Records that do not verify, by key: what was wrong. They count as not there."""

    def nonce(self) -> str:
        return self._tokens()

    def read(self, prefixes: Sequence[str] = PREFIXES) -> Iterator[Read]:
        """What has been written there since the last call, by anybody. StoreError."""
        now_s = int(self._clock.unix_s())
        for prefix in prefixes:
            for entry in list(self._store.list(prefix)):
                event = self._event(entry.key, now_s)
                if event is not None:
                    yield event

    def _event(self, key: str, now_s: int) -> Read | None:
        if key in self._known:
            return None
        parsed = ("cancel", 0, 0) if key == CANCEL_KEY else parse_key(key)
        if parsed is None:
            return None
        kind, launch = _KINDS[parsed[0]], parsed[1]
        if kind is Pulse and launch in self._over:
            return None
        try:
            record = read_record(self._store, key, kind)
        except IntegrityError as error:
            self.altered[key] = str(error)
            return None
        if record is None:
            return None
        self.altered.pop(key, None)
        self._note(key, record)
        return Read(launch, record, now_s)

    def _note(self, key: str, record: msgspec.Struct) -> None:
        if not isinstance(record, Pulse):
            self._known.add(key)
        if isinstance(record, Ended):
            self._over.add(record.launch)

    def write(self, key: str, record: _Nonced) -> tuple[bool, _Nonced]:
        """Whether this very record stands there now, and the one that does. StoreUnavailable: nobody knows yet; look what stands
        there before anything else is written, for a lost put may still land."""
        for pause_s in (*_PAUSES_S, None):
            try:
                found = write_record(self._store, key, record)
            except StoreUnavailable:
                if pause_s is None:
                    raise
                self._clock.sleep(pause_s)
                continue
            self._note(key, found)
            return found.nonce == record.nonce, found
        raise AssertionError("the last try returns or raises")
