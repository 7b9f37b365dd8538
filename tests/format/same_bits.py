"""States of any reader in a form in which equal means: the same types, and the same bits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from independent_reader import Array, Codec

from holdfast.checkpoint.arrays import adapter_for
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.tree import decode_document
from holdfast.store.base import Store
from holdfast.train.restoring import read_tree

CODECS: dict[str, Callable[[Any], Any]] = {
    "torch.Size": list,
    "torch.dtype": lambda dtype: str(dtype).removeprefix("torch."),
    "torch.device": str,
}


def plain(value: Any) -> Any:
    """A value of either reader, or of the program, in a form in which equal means the same type and the same bits."""
    if isinstance(value, Array):
        return ("array", value.library, value.dtype, value.shape, value.data)
    adapter = adapter_for(value)
    if adapter is not None:
        spec = adapter.spec("", value)
        data = bytes(adapter.stream(value, 0, spec.nbytes)) if spec.nbytes else b""
        return ("array", spec.library, spec.dtype, spec.shape, data)
    for name, encode in CODECS.items():
        if f"{type(value).__module__}.{type(value).__qualname__}" == name:
            return ("codec", name, plain(encode(value)))
    if isinstance(value, Codec):
        return ("codec", value.name, plain(value.value))
    if isinstance(value, dict):
        return (type(value).__name__, [(plain(key), plain(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [plain(item) for item in value])
    if isinstance(value, np.generic):
        return ("npscalar", value.dtype.str, value.tobytes())
    return (type(value).__name__, value if isinstance(value, (set, bytes, bytearray)) else repr(value))


def read_by_holdfast(store: Store, ref: CheckpointRef, open_home: Callable[[str], Store], rank: int = 0) -> Any:
    reader = open_checkpoint(store, ref, open_home)
    with ThreadPoolExecutor(2) as pool:
        return read_tree(reader, pool, decode_document(reader.document(rank)))
