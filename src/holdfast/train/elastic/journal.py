"""Compare-and-set on a store that has put-if-absent only: numbered records, each won by exactly one writer.

    newest: known number → get number + 1, until it is absent          write: put number + 1 if absent, nonce decides

A put without a clear answer is resolved by reading the number back, as for heads (checkpoint/heads.py). Old records are deleted
by who wrote them. So that a number whose successors have been deleted is never taken for the newest, nor won once more:
  - a record stays for KEPT_S after it was written, and the newest always;
  - what somebody knows to be the newest is believed for TRUSTED_S only. After that the store is asked for a list, and a put
    that took so long counts only if the list has nothing higher.
A list may lag behind by less than KEPT_S.
"""

from __future__ import annotations

import re
import threading
from collections import deque

from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, NotFound, StoreError, StoreUnavailable
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.train.elastic.state import MOST_BYTES, JobState, Page, decode_page, encode_page

__all__ = ["KEPT_S", "TRUSTED_S", "Journal"]

KEPT_S = 900.0
TRUSTED_S = 300.0
_DELETES_AT_ONCE = 8
"""Per write, so that a heartbeat is not held up by what a job of yesterday has left."""
_VANISHED_TRIES = 5


class Journal:
    """The versions of one job's state under `prefix` (ends in "/").

    Thread safety: every method; one call at a time is at work. Raises what the store raises, IntegrityError for a record that does
    not verify, and StoreUnavailable where the outcome of a write, or what is newest, cannot be told.
    """

    def __init__(self, store: Store, prefix: str, *, clock: Clock, tokens: TokenSource) -> None:
        self._store, self._prefix, self._clock, self._tokens = store, prefix, clock, tokens
        self._name = re.compile(re.escape(prefix) + r"(\d{12})")
        self._page: Page | None = None
        self._confirmed = (0.0, 0.0)
        self._looked_up = False
        self._old: deque[tuple[int, tuple[float, float]]] = deque()
        self._lock = threading.Lock()

    def newest(self) -> Page | None:
        """The newest version; None where there has never been one."""
        with self._lock:
            self._refresh()
            return self._page

    def write(self, after: int | None, state: JobState) -> tuple[Page | None, bool]:
        """Put `state` after version `after` (None: as the first), if that is the newest. Returns the newest version, and whether
        it is the one written here."""
        with self._lock:
            # A look costs a twelfth of a put that is lost, and torch lets versions be written after one read a second ago.
            self._refresh()
            if self._number != (after or 0):
                return self._page, False
            confirmed = self._confirmed
            page = Page(number=self._number + 1, nonce=self._tokens(), state=state)
            self._page = self._put(page)
            if self._page.nonce == page.nonce:
                self._old.append((page.number, self._now()))
            if max(self._ages_s(confirmed)) > TRUSTED_S:
                self._looked_up = False
            if self._page.nonce != page.nonce or not self._looked_up:
                self._refresh()
            self._sweep()
            return self._page, self._page.nonce == page.nonce

    @property
    def _number(self) -> int:
        return 0 if self._page is None else self._page.number

    def _put(self, page: Page) -> Page:
        """Returns the record that has the number now."""
        key = self._key(page.number)
        unclear: StoreUnavailable | None = None
        try:
            if self._store.put_new(key, encode_page(page)):
                return page
        except StoreUnavailable as error:
            unclear = error
        found = self._read(page.number)
        if found is None:
            raise unclear or StoreUnavailable(
                f"{self._store.url}/{key}: the store says that it is taken, and has it not"
            )
        return found

    def _refresh(self) -> None:
        if not self._is_trusted():
            self._look_up()
        while True:
            asked = self._now()
            following = self._read(self._number + 1)
            if following is None:
                break
            self._page = following
        self._confirmed, self._looked_up = asked, True

    def _look_up(self) -> None:
        """Go to the highest number that is listed, if it is higher than what is known."""
        for _ in range(_VANISHED_TRIES):
            matches = (self._name.fullmatch(entry.key) for entry in self._store.list(self._prefix))
            numbers = sorted(int(match[1]) for match in matches if match)
            if not numbers or numbers[-1] <= self._number:
                return
            found = self._read(numbers[-1])
            if found is not None:
                now, waiting = self._now(), {number for number, _ in self._old}
                self._old.extend((number, now) for number in numbers if number not in waiting)
                self._page = found
                return
        raise StoreUnavailable(
            f"{self._store.url}/{self._prefix}: the store lists records that it does not have; its lists are older than "
            f"{KEPT_S:.0f} s"
        )

    def _read(self, number: int) -> Page | None:
        """None: absent. Two tries: a bit that flipped on its way here is no damage."""
        try:
            return self._read_once(number)
        except IntegrityError:
            return self._read_once(number)

    def _read_once(self, number: int) -> Page | None:
        key = self._key(number)
        try:
            data = self._store.get(key, max_bytes=MOST_BYTES)
        except NotFound:
            return None
        return decode_page(data, number, what=f"{self._store.url}/{key}")

    def _sweep(self) -> None:
        """What is not deleted now is deleted later, or never: it costs little and misleads nobody."""
        for _ in range(_DELETES_AT_ONCE):
            if not self._old or self._old[0][0] >= self._number or min(self._ages_s(self._old[0][1])) <= KEPT_S:
                return
            number, _ = self._old.popleft()
            try:
                self._store.delete(self._key(number))
            except StoreError:
                return

    def _is_trusted(self) -> bool:
        return self._looked_up and max(self._ages_s(self._confirmed)) <= TRUSTED_S

    def _now(self) -> tuple[float, float]:
        return self._clock.monotonic_s(), self._clock.unix_s()

    def _ages_s(self, since: tuple[float, float]) -> tuple[float, float]:
        """By two clocks: one stands still while a machine is suspended, the other can be set. What must be old enough is so by
        both, what must be young enough too."""
        now = self._now()
        return now[0] - since[0], now[1] - since[1]

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:012d}"
