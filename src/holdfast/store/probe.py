"""Finds out whether a store keeps the one promise that fencing rests on: a conditional write must fail on a taken name.

Some servers accept the condition's header and ignore it. Then two attempts could both believe that they own the run, so this
is asked once, with real writes, before a run is opened.
"""

from __future__ import annotations

from holdfast.core.errors import StoreError, StoreUnsafe
from holdfast.store.base import Store

__all__ = ["probe_conditional_writes"]


def probe_conditional_writes(store: Store, token: str) -> None:
    """Write `probes/<token>` twice, only if absent, and remove it. Raises StoreUnsafe when the second write is accepted.

    `token` has never been used before, so the first write finds a free name; it may still be answered with "taken" when a
    retry inside the client met its own first try, which is why the content decides.
    """
    key = f"probes/{token}"
    first, second = f"first {token}".encode(), f"second {token}".encode()
    try:
        store.put_new(key, first)
        accepted_again = store.put_new(key, second)
        found = store.get(key, max_bytes=1024)
    finally:
        _remove(store, key)
    if accepted_again or found != first:
        raise StoreUnsafe(
            f"{store.url} accepts conditional writes (If-None-Match) and ignores the condition: two attempts of one run "
            "could overwrite each other's checkpoints there. Use a store that honours the condition (Amazon S3, Google "
            "Cloud Storage, Azure Blob Storage, recent MinIO and Ceph, a POSIX folder)"
        )


def _remove(store: Store, key: str) -> None:
    """A probe that stays behind is harmless; the answer, or the error under way, matters more."""
    try:
        store.delete(key)
    except StoreError:
        pass
