"""Small texts that are made once per run and never change: ids that tracking servers hand out (MLflow, Comet)."""

from __future__ import annotations

import re
from collections.abc import Callable

from holdfast.core.errors import NotFound, UsageError
from holdfast.store.base import Store

__all__ = ["remember"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_MAX_NOTE_BYTES = 1 << 20


def remember(store: Store, name: str, make: Callable[[], str]) -> str:
    """The text under `name`; made by `make` if there is none. When two processes make one at once, both get the first one's."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"remember: {name!r} is not a plain name")
    key = f"notes/{name}"
    try:
        return store.get(key, max_bytes=_MAX_NOTE_BYTES).decode()
    except NotFound:
        store.put_new(key, make().encode())
        return store.get(key, max_bytes=_MAX_NOTE_BYTES).decode()
