"""Sealed records in a store: read without believing what does not verify, written once without guessing an outcome.

Who writes a record and who reads it, and how long anybody tries, is the caller's matter.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from holdfast.core.errors import IntegrityError, NotFound, StoreUnavailable
from holdfast.core.sealed import MAX_RECORD_BYTES, seal, unseal
from holdfast.store.base import Store

__all__ = ["read_record", "read_sealed", "write_record"]

_Record = TypeVar("_Record", bound=msgspec.Struct)


def read_record(store: Store, key: str, kind: type[_Record]) -> _Record | None:
    """None: confirmed absent. Two tries: a bit that flipped on its way here is no altered record. IntegrityError for one."""
    found = read_sealed(store, key, kind)
    return None if found is None else found[0]


def read_sealed(store: Store, key: str, kind: type[_Record]) -> tuple[_Record, bytes] | None:
    """As `read_record`, with the sealed bytes, for whoever keeps them to look at them again."""
    for is_last in (False, True):
        try:
            data = store.get(key, max_bytes=MAX_RECORD_BYTES)
            return unseal(data, kind, what=f"{store.url}/{key}"), data
        except NotFound:
            return None
        except IntegrityError:
            if is_last:
                raise
    raise AssertionError("the last try returns or raises")


def write_record(store: Store, key: str, record: _Record) -> _Record:
    """Write if absent, and return the record that stands there: `record` itself, or that of whoever was first.

    StoreUnavailable while the outcome is unknown: a put that failed may have been applied, and may still land. Then the same record
    is written again, or what stands there is looked at, before anything else is done.
    """
    try:
        if store.put_new(key, seal(record)):
            return record
    except StoreUnavailable:
        # It may have been applied all the same.
        pass
    try:
        found = read_record(store, key, type(record))
    except IntegrityError as error:
        raise StoreUnavailable(f"{store.url}/{key}: what stands there cannot be read: {error}") from error
    if found is None:
        raise StoreUnavailable(f"{store.url}/{key}: the outcome of the write is not known yet")
    return found
