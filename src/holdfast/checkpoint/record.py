"""`run.json`: what a run is, written once, when the first process comes to its URL.

The record gives the run its identity, by which heads are told from those of another run. Where it is lost or altered, the newest
head still knows the identity, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast.checkpoint.format import RunRecord
from holdfast.checkpoint.heads import read_truth
from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, NotFound
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import FORMAT_VERSION, MAX_RECORD_BYTES, seal, unseal
from holdfast.store.base import Store
from holdfast.store.hygiene import describe_retention
from holdfast.store.probe import probe_conditional_writes

__all__ = ["RUN_KEY", "open_record", "read_record"]

RUN_KEY = "run.json"


def read_record(store: Store) -> RunRecord:
    """The record as it stands. Raises NotFound, and IntegrityError when it is not what was written."""
    return unseal(store.get(RUN_KEY, max_bytes=MAX_RECORD_BYTES), RunRecord, what=f"{store.url}/{RUN_KEY}")


def open_record(
    store: Store, *, clock: Clock, tokens: TokenSource, warn: Callable[[str], None] = lambda message: None
) -> RunRecord:
    """The record; a new one where there is no run yet. `warn` is told what a user should know about the store or the record.

    Raises StoreUnsafe when the store ignores conditional writes, IntegrityError when the record is altered and no head verifies.
    """
    try:
        return read_record(store)
    except NotFound:
        found = _from_newest_head(store)
        if found is None:
            return _create(store, clock, tokens, warn)
        warn(f"{store.url}/{RUN_KEY} is missing; the run's identity is taken from its newest head")
        return found
    except IntegrityError as error:
        found = _from_newest_head(store)
        if found is None:
            raise
        warn(f"{error}; the run's identity is taken from its newest head")
        return found


def _from_newest_head(store: Store) -> RunRecord | None:
    head = read_truth(store).head
    if head is None:
        return None
    return RunRecord(format=FORMAT_VERSION, run_id=head.run_id, created_unix_s=0.0, name="")


def _create(store: Store, clock: Clock, tokens: TokenSource, warn: Callable[[str], None]) -> RunRecord:
    probe_conditional_writes(store, tokens())
    name = store.url.rstrip("/").rsplit("/", 1)[-1]
    store.put_new(
        RUN_KEY,
        seal(RunRecord(format=FORMAT_VERSION, run_id=tokens(), created_unix_s=clock.unix_s(), name=name)),
    )
    for sentence in describe_retention(store, tokens()):
        warn(sentence)
    # Another process may have been first: the record that stands is the run's.
    return read_record(store)
