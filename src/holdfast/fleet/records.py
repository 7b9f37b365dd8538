"""The records of one run in its store, from the controller's side: read as events, written once, won or lost.

A put that fails says nothing by itself, and one that is refused may have been our own first try: what stands there is read back,
and the nonce tells. Records never change, so each is read once in the life of a process, or of an index that outlives it; pulses
are read anew. Which records there are, only the store's list says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, StoreUnavailable
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
    Reservation,
    parse_key,
)
from holdfast.core.sealed import seal, unseal
from holdfast.fleet.index import Index
from holdfast.fleet.view import Read, Record
from holdfast.store.base import Store
from holdfast.store.records import read_sealed, write_record

__all__ = ["PREFIXES", "WORDS", "RunRecords"]

_KINDS: dict[str, type[Record]] = {
    "intent": Intent, "answer": Answer, "ended": Ended, "grant": GrantRecord, "command": Command, "holder": Holder,
    "word": MachineWord, "pulse": Pulse, "cancel": Cancel, "reserved": Reservation,
}  # fmt: skip
WORDS = ("machines/",)
PREFIXES = (*WORDS, "control/", "launches/")
"""What machines say first: an older list of theirs never makes a later record of a controller look alone."""
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_Nonced = TypeVar("_Nonced", Intent, Answer, Ended, GrantRecord, Command, Cancel, Reservation)


class RunRecords:
    """Thread safety: none; one thread at a time."""

    def __init__(
        self, store: Store, *, clock: Clock, tokens: TokenSource, index: Index | None = None, run_id: str = ""
    ) -> None:
        """`index` keeps what was read, under `run_id`: a URL may be used again, an id is not."""
        self._store, self._clock, self._tokens, self._index, self._run_id = store, clock, tokens, index, run_id
        self._known: set[str] = set()
        self._over: set[int] = set()
        self.altered: dict[str, str] = {}
        """Records that do not verify, by key: what was wrong. They count as not there."""

    def nonce(self) -> str:
        return self._tokens()

    def read(self, prefixes: Sequence[str] = PREFIXES) -> Iterator[Read]:
        """What has been written there since the last call, by anybody. Where only WORDS are asked for, pulses of those machines
        that have said something. StoreError."""
        now_s = int(self._clock.unix_s())
        for prefix in prefixes:
            found = [(entry.key, *_parsed(entry.key)) for entry in list(self._store.list(prefix))]
            new = [each for each in found if each[1] is not None and each[0] not in self._known]
            told = {launch for _, kind, launch in new if kind is not Pulse}
            for key, kind, launch in new:
                if kind is None or (
                    kind is Pulse and (launch in self._over or (prefixes is WORDS and launch not in told))
                ):
                    continue
                record = self._record(key, kind)
                if record is not None:
                    yield Read(launch, record, now_s)

    def _record(self, key: str, kind: type[Record]) -> Record | None:
        record = self._indexed(key, kind)
        if record is None:
            try:
                found = read_sealed(self._store, key, kind)
            except IntegrityError as error:
                self.altered[key] = str(error)
                return None
            if found is None:
                return None
            record, data = found
            if self._index is not None and kind is not Pulse:
                self._index.put(self._run_id, key, data)
        self.altered.pop(key, None)
        self._note(key, record)
        return record

    def _indexed(self, key: str, kind: type[Record]) -> Record | None:
        if self._index is None or kind is Pulse:
            return None
        data = self._index.get(self._run_id, key)
        if data is None:
            return None
        try:
            return unseal(data, kind, what=f"{self._store.url}/{key}, from the index")
        except HoldfastError:
            self._index.drop(self._run_id, key)
            return None

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
            won = found.nonce == record.nonce
            if won and self._index is not None:
                self._index.put(self._run_id, key, seal(record))
            return won, found
        raise AssertionError("the last try returns or raises")


def _parsed(key: str) -> tuple[type[Record] | None, int]:
    parsed = ("cancel", 0, 0) if key == CANCEL_KEY else parse_key(key)
    return (None, 0) if parsed is None else (_KINDS[parsed[0]], parsed[1])
