"""Finds out whether a bucket keeps, and bills, what holdfast deletes, or deletes what holdfast keeps.

Versioning, soft delete and retention keep old checkpoints for days or for ever: a run that saves a terabyte an hour then pays for
all of them. A lifecycle rule may remove checkpoints that are still needed. Asked once, when a run is made; what cannot be
seen with the run's own credentials is passed over in silence.
"""

from __future__ import annotations

from threading import Thread

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import HoldfastError
from holdfast.store.base import Store

__all__ = ["BOUND_S", "describe_retention"]

BOUND_S = 5.0
"""The caller waits no longer, whatever the network does."""


def describe_retention(
    store: Store, token: str, *, bound_s: float = BOUND_S, clock: Clock | None = None
) -> tuple[str, ...]:
    """What a user should know about the bucket's own rules, one sentence each; nothing for a local folder.

    Writes and removes `probes/<token>`; `token` has never been used before. Never raises for what the store or the network does.
    """
    if store.url.startswith(("file://", "memory://")):
        return ()
    from holdfast.store.bucket_rules import bucket_rules
    from holdfast.store.remote import ObjectStore

    if not isinstance(store, ObjectStore):
        return ()
    found: list[str] = []

    # A thread of its own, because neither name resolution nor the search for credentials takes a time limit.
    def look() -> None:
        key = f"probes/{token}"
        try:
            for sentence in bucket_rules(store, key, clock or SystemClock()):
                found.append(f"{store.url}: {sentence}")
        except Exception:
            # Whatever went wrong: this is advice, and the run must start without it.
            pass
        finally:
            _remove(store, key)

    looking = Thread(target=look, name="holdfast-hygiene", daemon=True)
    looking.start()
    looking.join(bound_s)
    return tuple(found)


def _remove(store: Store, key: str) -> None:
    try:
        store.delete(key)
    except HoldfastError:
        pass
