"""torch tensors as arrays. Beside `dtensors.py` the only module of this floor that imports torch.

On the CPU a snapshot is a plain parallel copy: overlapping it with the next step costs as much as it saves. On CUDA the copy runs
on a side stream into pinned staging while forward and backward go on. What only optimizers write (parameters, their state) is
copied last, and every optimizer's pre-step hook calls `release`, which makes the computing stream wait for it; everything else
(buffers, RNG, EMA) the computing stream waits for at once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

import torch

from holdfast.checkpoint.arrays import ArraySpec, Copy, elements
from holdfast.checkpoint.tree import register_codec
from holdfast.core.errors import UnsupportedState

__all__ = ["TorchAdapter"]

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.float8_e4m3fn: "f8_e4m3fn",
    torch.float8_e4m3fnuz: "f8_e4m3fnuz",
    torch.float8_e5m2: "f8_e5m2",
    torch.float8_e5m2fnuz: "f8_e5m2fnuz",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SMALL_BYTES = 1 << 20
_side_streams: dict[int, torch.cuda.Stream] = {}
_lock = threading.Lock()


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor. One of a single element counts as contiguous whatever its strides say."""
    data: memoryview = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
    return data


class _HostCopy:
    """Finished before it was returned."""

    def release(self) -> None:
        return None

    def wait(self) -> None:
        return None


class _DeviceCopy:
    """Copies on side streams, one event per device after which the bytes are in host memory."""

    def __init__(self, events: dict[int, torch.cuda.Event]) -> None:
        self._events = events
        self._released = False

    def release(self) -> None:
        if not self._released:
            self._released = True
            for device, event in self._events.items():
                torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        for event in self._events.values():
            event.synchronize()


class TorchAdapter:
    """Dense strided tensors on any device whose bytes can be copied to the host."""

    library = "torch"

    def recognises(self, value: object) -> bool:
        return isinstance(value, torch.Tensor)

    def spec(self, name: str, value: torch.Tensor) -> ArraySpec:
        if type(value) is not torch.Tensor and type(value) is not torch.nn.Parameter:
            _refuse_strange(name, value)
        dtype = _NAMES.get(value.dtype)
        if dtype is None or value.layout is not torch.strided or value.is_nested:
            raise UnsupportedState(
                f"{name or 'the state'}: a {'nested' if value.is_nested else value.layout} tensor of dtype {value.dtype} cannot be "
                "stored; track a dense tensor of a plain dtype"
            )
        if value.is_meta:
            raise UnsupportedState(
                f"{name or 'the state'}: the tensor is on the meta device and holds no data; materialise it first"
            )
        shape = tuple(value.shape)
        return ArraySpec(name, dtype, shape, shape, (0,) * len(shape), self.library)

    def address(self, value: torch.Tensor) -> int:
        return value.data_ptr()

    def identity(self, value: torch.Tensor) -> tuple[object, ...]:
        if value.numel() == 0:
            return (self.library, id(value))
        # A conjugate or negative view has its base's memory, shape and strides, and other values.
        seen_as = (value.dtype, value.is_conj(), value.is_neg())
        return (self.library, value.device, value.data_ptr(), value.shape, value.stride(), seen_as)

    def view(self, spec: ArraySpec, buffer: memoryview) -> torch.Tensor:
        if spec.nbytes == 0:
            return self.allocate(spec)
        return torch.frombuffer(buffer, dtype=_DTYPES[spec.dtype]).view(spec.shape)

    def pin(self, values: Sequence[torch.Tensor], address: int, size_bytes: int) -> Callable[[], None] | None:
        if not any(value.is_cuda for value in values):
            return None
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, size_bytes, 0)) != 0:
            # Copies into pageable memory are right as well; they only hold up the loop.
            return None
        return lambda: runtime.cudaHostUnregister(address)

    @torch.no_grad()
    def copy(self, values: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], deferrable: Sequence[bool]) -> Copy:
        devices = sorted({value.device.index or 0 for value in values if value.is_cuda})
        events = {}
        if devices:
            triples = [triple for triple in zip(values, targets, deferrable, strict=True) if triple[0].is_cuda]
            events = {device: self._copy_device(device, triples) for device in devices}
            host = [pair for pair in zip(values, targets, strict=True) if not pair[0].is_cuda]
            values, targets = [value for value, _ in host], [target for _, target in host]
        sizes = [target.nbytes for target in targets]
        # One call for the many small ones: it saves the interpreter's overhead per tensor.
        if any(size < _SMALL_BYTES for size in sizes):
            torch._foreach_copy_(
                [target for target, size in zip(targets, sizes, strict=True) if size < _SMALL_BYTES],
                [value for value, size in zip(values, sizes, strict=True) if size < _SMALL_BYTES],
            )
        for value, target, size in zip(values, targets, sizes, strict=True):
            if size >= _SMALL_BYTES:
                target.copy_(value)
        return _DeviceCopy(events) if events else _HostCopy()

    def _copy_device(self, device: int, triples: Sequence[tuple[torch.Tensor, torch.Tensor, bool]]) -> torch.cuda.Event:
        with _lock:
            side = _side_streams.get(device) or _side_streams.setdefault(device, torch.cuda.Stream(device))
        computing = torch.cuda.current_stream(device)
        side.wait_stream(computing)
        mine = [t for t in triples if (t[0].device.index or 0) == device]
        with torch.cuda.stream(side):
            for wanted_later in (False, True):
                for value, target, later in mine:
                    if later is wanted_later:
                        target.copy_(value, non_blocking=True)
                        value.record_stream(side)
                if not wanted_later:
                    computing.wait_event(side.record_event())
            finished: torch.cuda.Event = side.record_event()
            return finished

    def stream(self, value: torch.Tensor, start_byte: int, length: int) -> memoryview:
        start, stop = start_byte // value.element_size(), (start_byte + length) // value.element_size()
        piece = elements(value.detach(), start, stop).cpu().resolve_conj().resolve_neg().contiguous()
        return _as_bytes(piece)

    def allocate(self, spec: ArraySpec) -> torch.Tensor:
        return torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])

    def writable(self, value: torch.Tensor) -> memoryview | None:
        if value.device.type != "cpu" or not value.is_contiguous() or value.numel() == 0:
            return None
        if value.is_conj() or value.is_neg():
            return None
        # Four times as fast as the way over numpy, for thousands of small tensors.
        return memoryview((ctypes.c_ubyte * value.nbytes).from_address(value.data_ptr())).cast("B")

    @torch.no_grad()
    def assign(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def rows(self, value: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return value.detach()[start:stop]

    def holders(self, value: torch.Tensor) -> tuple[int, ...] | None:
        return None


def _refuse_strange(name: str, value: torch.Tensor) -> None:
    """Subclasses that only decorate are fine. Wrappers (sharded, quantised, functional) keep their data elsewhere: their own
    pointer is null and their dtype is not that of the bytes."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if torch.nn.parameter.is_lazy(value):
        raise UnsupportedState(
            f"{name or 'the state'}: a {kind} has no shape yet; run the module once before the run is restored or saved"
        )
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedState(
            f"{name or 'the state'}: a tensor of type {kind} keeps its data elsewhere and cannot be stored as it is; "
            "track the plain tensors that it is made of"
        )


register_codec(torch.Size, "torch.Size", list, torch.Size)
register_codec(torch.device, "torch.device", str, torch.device)


def _dtype_named(name: object) -> torch.dtype:
    for dtype in vars(torch).values():
        if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}":
            return dtype
    raise UnsupportedState(f"this torch has no dtype {name!r}")


register_codec(torch.dtype, "torch.dtype", lambda dtype: str(dtype).removeprefix("torch."), _dtype_named)
