"""L1: object stores behind one small interface.

`open_store` turns a URL into a `Store`; checkpoints, ledger and heads go through it as named, immutable objects. The clouds'
client (`holdfast.store.remote`) is imported only when a cloud URL is opened.
"""

from __future__ import annotations

from holdfast.store.base import Entry, Store, check_key
from holdfast.store.hygiene import describe_retention
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.store.open import normalise_url, open_store
from holdfast.store.probe import probe_conditional_writes

__all__ = [
    "Entry",
    "LocalStore",
    "MemoryStore",
    "Store",
    "check_key",
    "describe_retention",
    "normalise_url",
    "open_store",
    "probe_conditional_writes",
]
