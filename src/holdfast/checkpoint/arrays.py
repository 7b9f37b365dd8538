"""What an array is to holdfast, whatever library owns it.

An `ArraySpec` describes bytes: dtype, the shape of the part held here, and where that part lies in the global tensor (so that a
tensor sharded over ranks is described by the same words). An `ArrayAdapter` knows one library's arrays: it recognises them, copies
them into staging, and makes or fills them at restore. numpy's adapter is here; torch's is in `torch_arrays.py` and is loaded only
when the process has already imported torch; that of its sharded tensors is in `dtensors.py`, loaded only when the process has
imported those.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from holdfast.core.errors import UnsupportedState

__all__ = [
    "DTYPE_BYTES",
    "ArrayAdapter",
    "ArraySpec",
    "Copy",
    "NumpyAdapter",
    "adapter_for",
    "adapter_named",
    "can_be_sharded",
    "elements",
    "is_sharded",
]

DTYPE_BYTES: dict[str, int] = {
    "bool": 1,
    "u8": 1,
    "u16": 2,
    "u32": 4,
    "u64": 8,
    "i8": 1,
    "i16": 2,
    "i32": 4,
    "i64": 8,
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "c64": 8,
    "c128": 16,
    "f8_e4m3fn": 1,
    "f8_e4m3fnuz": 1,
    "f8_e5m2": 1,
    "f8_e5m2fnuz": 1,
}
"""Bytes per element of every dtype that the format knows. All are little-endian."""


class ArraySpec(NamedTuple):
    """One array, or one rank's part of it. A tuple, because every save makes and compares one for each array.

    `shape` is what is held here; it starts at `offsets` in the tensor of `global_shape`. Unsharded: offsets are all zero and both
    shapes are equal. Bytes are in C order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    library: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Copy(Protocol):
    """A copy of many arrays that may still be under way (CUDA)."""

    def release(self) -> None:
        """Called before an optimizer writes: from here on, what still has to be copied must be safe from the writer."""
        ...

    def wait(self) -> None:
        """Block until every byte is in staging. Called from the saver's thread."""
        ...


class ArrayAdapter(Protocol):
    """Knows one library's arrays. Stateless and thread-safe."""

    library: str

    def recognises(self, value: object) -> bool: ...

    def spec(self, name: str, value: Any) -> ArraySpec:
        """Raises UnsupportedState for layouts that cannot be stored (sparse, quantised, object dtype)."""
        ...

    def address(self, value: Any) -> int:
        """Where its memory begins; 0 for an array without bytes. Values that are the same memory have the same address."""
        ...

    def identity(self, value: Any) -> tuple[object, ...]:
        """Equal for two values that are the same memory seen the same way (tied weights), which are then stored once."""
        ...

    def view(self, spec: ArraySpec, buffer: memoryview) -> Any:
        """The buffer's bytes (aligned, as many as `spec` says) as an array of this library, without a copy."""
        ...

    def pin(self, values: Sequence[Any], address: int, size_bytes: int) -> Callable[[], None] | None:
        """Page-lock staging memory if `values` lie on a device that copies faster into it. Returns what undoes that."""
        ...

    def copy(self, values: Sequence[Any], targets: Sequence[Any], deferrable: Sequence[bool]) -> Copy:
        """Copy each value into its target (made by `view`). Where `deferrable`, the copy may go on until an optimizer steps."""
        ...

    def stream(self, value: Any, start_byte: int, length: int) -> memoryview:
        """Bytes [start, start + length) of the value in C order, for the mode without staging; valid until the value changes."""
        ...

    def allocate(self, spec: ArraySpec) -> Any:
        """A new, uninitialised array for `spec` in host memory."""
        ...

    def writable(self, value: Any) -> memoryview | None:
        """The value's own memory as writable bytes, if it is contiguous host memory; otherwise None (allocate, then assign).

        The view does not keep the value alive: the caller does.
        """
        ...

    def assign(self, target: Any, source: Any) -> None:
        """Copy `source` (made by `allocate`) into `target`, which may lie on another device."""
        ...

    def rows(self, value: Any, start: int, stop: int) -> Any:
        """Rows [start, stop) along dimension 0, without a copy."""
        ...

    def holders(self, value: Any) -> tuple[int, ...] | None:
        """The global ranks that hold this very shard, this one included, as far as the value itself knows (others may, too: see
        `shares.agree_on_shards`); None for an array that is not sharded."""
        ...


_NUMPY_NAMES = {
    np.dtype(np.bool_): "bool",
    np.dtype(np.uint8): "u8",
    np.dtype(np.uint16): "u16",
    np.dtype(np.uint32): "u32",
    np.dtype(np.uint64): "u64",
    np.dtype(np.int8): "i8",
    np.dtype(np.int16): "i16",
    np.dtype(np.int32): "i32",
    np.dtype(np.int64): "i64",
    np.dtype(np.float16): "f16",
    np.dtype(np.float32): "f32",
    np.dtype(np.float64): "f64",
    np.dtype(np.complex64): "c64",
    np.dtype(np.complex128): "c128",
}
_NUMPY_TYPES = {name: dtype for dtype, name in _NUMPY_NAMES.items()}


class _Done:
    """A copy that was finished when it was returned."""

    def release(self) -> None:
        return None

    def wait(self) -> None:
        return None


class NumpyAdapter:
    """numpy arrays of numbers and booleans in the machine's (little-endian) byte order."""

    library = "numpy"

    def recognises(self, value: object) -> bool:
        return type(value) is np.ndarray

    def spec(self, name: str, value: np.ndarray[Any, Any]) -> ArraySpec:
        dtype = _NUMPY_NAMES.get(value.dtype)
        if dtype is None or not value.dtype.isnative:
            raise UnsupportedState(
                f"{name or 'the state'}: numpy values of dtype {value.dtype!s} cannot be stored; "
                "convert it to a plain number type first"
            )
        return ArraySpec(name, dtype, value.shape, value.shape, (0,) * value.ndim, self.library)

    def address(self, value: np.ndarray[Any, Any]) -> int:
        return int(value.__array_interface__["data"][0]) if value.size else 0

    def identity(self, value: np.ndarray[Any, Any]) -> tuple[object, ...]:
        return (self.library, value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str)

    def view(self, spec: ArraySpec, buffer: memoryview) -> np.ndarray[Any, Any]:
        return (
            np.frombuffer(buffer, dtype=self._dtype(spec)).reshape(spec.shape) if spec.nbytes else self.allocate(spec)
        )

    def pin(self, values: Sequence[Any], address: int, size_bytes: int) -> None:
        return None

    def copy(
        self,
        values: Sequence[np.ndarray[Any, Any]],
        targets: Sequence[np.ndarray[Any, Any]],
        deferrable: Sequence[bool],
    ) -> Copy:
        for value, target in zip(values, targets, strict=True):
            np.copyto(target, value)
        return _Done()

    def stream(self, value: np.ndarray[Any, Any], start_byte: int, length: int) -> memoryview:
        start, stop = start_byte // value.itemsize, (start_byte + length) // value.itemsize
        return np.ascontiguousarray(elements(value, start, stop)).view(np.uint8).data

    def allocate(self, spec: ArraySpec) -> np.ndarray[Any, Any]:
        return np.empty(spec.shape, dtype=self._dtype(spec))

    def _dtype(self, spec: ArraySpec) -> np.dtype[Any]:
        dtype = _NUMPY_TYPES.get(spec.dtype)
        if dtype is None:
            raise UnsupportedState(
                f"{spec.name or 'the state'}: {spec.dtype} is not a numpy dtype; install torch to read it"
            )
        return dtype

    def writable(self, value: np.ndarray[Any, Any]) -> memoryview | None:
        if not (value.flags.c_contiguous and value.flags.writeable) or value.size == 0:
            return None
        return value.reshape(-1).view(np.uint8).data

    def assign(self, target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
        np.copyto(target, source)

    def rows(self, value: np.ndarray[Any, Any], start: int, stop: int) -> np.ndarray[Any, Any]:
        return value[start:stop]

    def holders(self, value: np.ndarray[Any, Any]) -> None:
        return None


def elements(array: Any, start: int, stop: int) -> Any:
    """Elements [start, stop) of an array of any strides in C order, one-dimensional, copying little more than those."""
    while array.ndim > 1:
        row = math.prod(array.shape[1:])
        first, last = start // row, -(-stop // row)
        array, start, stop = array[first:last], start - first * row, stop - first * row
        if last - first != 1:
            break
        array = array[0]
    return array.reshape(-1)[start:stop]


_NUMPY = NumpyAdapter()
_torch: ArrayAdapter | None = None
_SHARDED = ("torch.distributed.tensor", "torch.distributed._tensor")
"""Where torch's sharded tensors are at home; before 2.5 in the second."""
_BY_TYPE: dict[type, ArrayAdapter] = {np.ndarray: _NUMPY}
"""What is already known of exact types, for speed."""


def _torch_adapter() -> ArrayAdapter:
    global _torch
    if _torch is None:
        from holdfast.checkpoint.torch_arrays import TorchAdapter

        _torch = TorchAdapter()
    return _torch


def adapter_for(value: object) -> ArrayAdapter | None:
    """The adapter that stores `value` as an array, or None when it is no array."""
    known = _BY_TYPE.get(type(value))
    if known is not None:
        return known
    if _torch is not None or "torch" in sys.modules:
        for adapter in (*_sharded_adapters(), _torch or _torch_adapter()):
            if adapter.recognises(value):
                _BY_TYPE[type(value)] = adapter
                return adapter
    return None


def can_be_sharded() -> bool:
    """Whether this process knows of sharded tensors at all."""
    return any(name in sys.modules for name in _SHARDED)


def is_sharded(value: object) -> bool:
    """Whether `value` is an array of which this process may hold a part only."""
    adapter = adapter_for(value) if can_be_sharded() else None
    return adapter is not None and adapter.holders(value) is not None


def _sharded_adapters() -> tuple[ArrayAdapter, ...]:
    if not can_be_sharded():
        return ()
    from holdfast.checkpoint.dtensors import ADAPTER

    return (ADAPTER,)


def adapter_named(library: str) -> ArrayAdapter:
    """The adapter that makes arrays of `library`. Falls back to numpy where torch is not installed (inspection, export)."""
    if library == "torch":
        try:
            return _torch_adapter()
        except ImportError:
            return _NUMPY
    return _NUMPY
