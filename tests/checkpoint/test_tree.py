"""Trees come back exactly as they were; what cannot be stored is refused by name; hostile documents are only ever refused."""

from __future__ import annotations

import gc
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaved import SCALE

from holdfast.checkpoint.arrays import adapter_for, adapter_named
from holdfast.checkpoint.format import ArrayEntry, Part, encode_part
from holdfast.checkpoint.snapshot import lay_out, stage, stream
from holdfast.checkpoint.staging import Slot
from holdfast.checkpoint.tree import FlatTree, decode_document, flatten, register_codec, unflatten
from holdfast.core.errors import FormatError, UnsupportedState, UsageError
from holdfast.core.sealed import FORMAT_VERSION

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_TORCH_DTYPES = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, *_FLOAT8,
)  # fmt: skip
_NUMPY_DTYPES = ("?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")

_keys = st.one_of(
    st.sampled_from(
        ["", "$", "$x", "a/b", "~", "~1", "~0", "a~2", "1", "0", "ü", "\ud800", "\ud83d\ude00", "😀", "\0"]
    ),
    st.text(st.characters(exclude_categories=()), max_size=4),
)
_int_keys = st.one_of(st.integers(-3, 3), st.integers())
_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def _numpy_arrays(draw: st.DrawFn) -> Any:
    dtype, shape = np.dtype(draw(st.sampled_from(_NUMPY_DTYPES))), draw(_shapes)
    raw = draw(st.binary(min_size=0, max_size=16)) or b"\0"
    count = math.prod(shape) * dtype.itemsize
    if dtype == np.bool_:
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer((raw * (count // len(raw) + 1))[:count], dtype=dtype).reshape(shape).copy()
    form = draw(st.sampled_from(["plain", "transposed", "strided", "reversed", "broadcast", "read-only"]))
    if form == "transposed":
        return array.T
    if form == "strided" and array.ndim:
        return array[::2]
    if form == "reversed" and array.ndim:
        return array[::-1]
    if form == "broadcast":
        return np.broadcast_to(array, (2, *shape))
    if form == "read-only":
        array.flags.writeable = False
    return array


@st.composite
def _tensors(draw: st.DrawFn) -> Any:
    dtype, shape = draw(st.sampled_from(_TORCH_DTYPES)), draw(_shapes)
    raw = bytearray(draw(st.binary(min_size=1, max_size=16)))
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    count = math.prod(shape) * item_bytes
    if dtype is torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    filled = (raw * (count // len(raw) + 1))[:count]
    tensor = torch.frombuffer(filled, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    form = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "conjugate", "negative", "parameter"]))
    if form == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1)
    if form == "strided" and tensor.ndim:
        return tensor[1::2]
    if form == "expanded":
        return tensor.expand((2, *shape))
    if form == "conjugate" and dtype.is_complex:
        return tensor.conj()
    if form == "negative" and dtype.is_complex:
        return tensor.conj().imag
    if form == "parameter" and dtype.is_floating_point:
        return torch.nn.Parameter(tensor)
    return tensor


_numpy_scalars = st.builds(
    lambda name, raw: np.frombuffer((raw if name != "?" else b"\1" * 16)[: np.dtype(name).itemsize], dtype=name)[0],
    st.sampled_from(_NUMPY_DTYPES), st.binary(min_size=16, max_size=16),
)  # fmt: skip
_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**60), 10**60), st.floats(), st.complex_numbers(allow_nan=False),
    st.text(st.characters(exclude_categories=()), max_size=5), st.binary(max_size=5), st.binary(max_size=5).map(bytearray),
    st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, -0.0, math.nan, math.inf, -math.inf, complex(-0.0, math.nan)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])]),
    _numpy_scalars, _numpy_arrays(), _tensors(),
)  # fmt: skip
_trees = st.recursive(
    _leaves,
    lambda child: st.one_of(
        st.lists(child, max_size=4), st.lists(child, max_size=3).map(tuple), st.dictionaries(_keys, child, max_size=4),
        st.dictionaries(st.one_of(_keys, _int_keys), child, max_size=5),
        st.dictionaries(_keys, child, max_size=3).map(OrderedDict),
        st.dictionaries(_int_keys, st.integers(), max_size=3).map(Counter),
        st.sets(st.one_of(st.integers(), _keys), max_size=3),
    ),
    max_leaves=12,
)  # fmt: skip


def _bytes_of(array: Any) -> bytes:
    adapter = adapter_for(array)
    assert adapter is not None
    size_bytes = adapter.spec("", array).nbytes
    return bytes(adapter.stream(array, 0, size_bytes)) if size_bytes else b""


def _same(one: Any, other: Any) -> bool:
    """Equal in type and in every bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and _bytes_of(one) == _bytes_of(other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
    if isinstance(one, np.generic):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, complex):
        return _same(one.real, other.real) and _same(one.imag, other.imag)
    if isinstance(one, dict):
        pairs = list(zip(one.items(), other.items(), strict=False))
        return len(one) == len(other) and all(_same(a[0], b[0]) and _same(a[1], b[1]) for a, b in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _put_together(flat: FlatTree, read: Any) -> Any:
    """The tree from its document and from what `read(index, start, length)` says the arrays' bytes are."""
    arrays: dict[str, Any] = {}
    for index, leaf in enumerate(flat.leaves):
        made = adapter_named(leaf.adapter.library).allocate(leaf.spec)
        memory = leaf.adapter.writable(made)
        if leaf.spec.nbytes:
            assert memory is not None
            half = leaf.spec.nbytes // 2 // 16 * 16
            memory[:half] = read(index, 0, half)
            memory[half:] = read(index, half, leaf.spec.nbytes - half)
        arrays[leaf.name] = made
    return unflatten(decode_document(flat.document), arrays.__getitem__)


@settings(max_examples=400 * SCALE)
@given(_trees)
def test_every_tree_comes_back(tree: Any) -> None:
    """Through staging and through streaming, with names that the index can hold."""
    flat = flatten(tree)
    layout = lay_out(flat)
    assert len({leaf.name for leaf in flat.leaves}) == len(flat.leaves)
    entries = [ArrayEntry(*leaf.spec, []) for leaf in flat.leaves]
    encode_part(Part(FORMAT_VERSION, 0, [], [], entries, flat.document))
    live = stream(flat, layout, step=0, epoch=0, metadata={})
    assert _same(_put_together(flat, live.read), tree)
    slot = Slot(layout.total_bytes + 1)
    for _ in range(2):
        staged = stage(flat, layout, slot, step=0, epoch=0, metadata={}, deferrable=lambda leaf: False)
        staged.complete()
        assert _same(_put_together(flat, staged.read), tree)
    slot.close()


def test_keys_that_look_the_same_do_not_collide() -> None:
    arrays = [np.array([float(number)]) for number in range(8)]
    tree = {
        1: arrays[0], "1": arrays[1], "a": {"b": arrays[2]}, "a/b": arrays[3], "": {"c": arrays[4], "": arrays[5]},
        "c": arrays[6], "1~2": arrays[7],
    }  # fmt: skip
    flat = flatten(tree)
    assert len({leaf.name for leaf in flat.leaves}) == 8
    assert [leaf.spec.name for leaf in flat.leaves] == [leaf.name for leaf in flat.leaves]
    back = _put_together(flat, stream(flat, lay_out(flat), step=0, epoch=0, metadata={}).read)
    assert _same(back, tree)


def test_tied_arrays_are_stored_once_and_come_back_tied() -> None:
    weight, array = torch.arange(6.0).view(2, 3), np.arange(4)
    tree = {"a": weight, "b": torch.nn.Parameter(weight), "view": weight.T, "n": array, "m": array, "part": weight[0]}
    flat = flatten(tree)
    assert [leaf.name for leaf in flat.leaves] == ["a", "view", "n", "part"]
    back = _put_together(flat, stream(flat, lay_out(flat), step=0, epoch=0, metadata={}).read)
    assert back["a"] is back["b"]
    assert back["n"] is back["m"]


def test_a_conjugate_view_is_not_taken_for_its_base() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    tree = {"base": base, "conj": base.conj(), "imag": base.imag, "neg": base.conj().imag}
    flat = flatten(tree)
    assert len(flat.leaves) == 4
    back = _put_together(flat, stream(flat, lay_out(flat), step=0, epoch=0, metadata={}).read)
    assert all(torch.equal(back[key], tree[key]) for key in tree)
    assert flat.leaves[1].adapter.writable(base.conj()) is None


class _Wrapper(torch.Tensor):
    """A tensor whose data is elsewhere, as a sharded or a quantised one's is."""

    @staticmethod
    def __new__(cls) -> _Wrapper:
        made: _Wrapper = torch.Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("not computed with here")


_Point = namedtuple("_Point", "x y")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "builtins.object"),
        (_Point(1, 2), "_Point"),
        (defaultdict(int), "defaultdict"),
        ({1.5: 0}, "float"),
        ({True: 0}, "bool"),
        ({(1, 2): 0}, "tuple"),
        ({1.5, 2.5}, "sets"),
        (frozenset([1]), "frozenset"),
        (np.array(["text"]), "dtype"),
        (np.array([object()]), "dtype object"),
        (np.array([1], dtype=">i4"), "dtype >i4"),
        (np.array([(1, 2)], dtype="i4,i4"), "dtype"),
        (np.datetime64("2026-01-01"), "datetime64"),
        (np.ma.array([1, 2]), "MaskedArray"),
        (np.longdouble(1), "float128"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta device"),
        (torch.nn.parameter.UninitializedParameter(), "has no shape yet"),
        (_Wrapper(), "_Wrapper"),
        (10**4000, "4000 digits"),
        (lambda: 0, "function"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_with_its_path(value: Any, says: str) -> None:
    with pytest.raises(UnsupportedState) as caught:
        flatten({"model": [0, {"x/y": value}]})
    assert str(caught.value).startswith("model/1/x~1y")
    assert says in str(caught.value)


def test_a_tree_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnsupportedState, match="contains itself"):
        flatten(loop)


def test_a_registered_type_comes_back_and_its_name_is_taken() -> None:
    class Celsius:
        def __init__(self, degrees: np.ndarray[Any, Any]) -> None:
            self.degrees = degrees

    register_codec(Celsius, "test.celsius", lambda value: {"d": value.degrees}, lambda tree: Celsius(tree["d"]))
    flat = flatten({"t": Celsius(np.array([1.5]))})
    back = _put_together(flat, stream(flat, lay_out(flat), step=0, epoch=0, metadata={}).read)
    assert back["t"].degrees == 1.5
    with pytest.raises(UsageError, match="already belongs"):
        register_codec(int, "test.celsius", str, int)
    with pytest.raises(UnsupportedState, match="not registered"):
        unflatten({"$": "codec", "name": "test.unknown", "v": 1}, str)
    with pytest.raises(FormatError, match="could not decode"):
        unflatten({"$": "codec", "name": "test.celsius", "v": 1}, str)


def test_the_collector_is_on_again_after_a_refusal() -> None:
    assert gc.isenabled()
    with pytest.raises(UnsupportedState):
        flatten(object())
    assert gc.isenabled()


_TAGS: tuple[Any, ...] = (
    "array", "tuple", "dict", "int", "float", "bytes", "str", "npscalar", "set", "odict", "counter", "complex", "bytearray",
    "codec", "unknown", None, 1, [], {},
)  # fmt: skip
_hostile = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just("nan"), st.just("AAAA"),
        st.just("1" * 5000), st.sampled_from(["f32", "bf16", "torch.dtype", "torch.device", "torch.Size", "nn"]),
    ),
    lambda child: st.one_of(
        st.lists(child, max_size=3), st.lists(st.lists(child, min_size=2, max_size=2), max_size=3),
        st.dictionaries(st.text(max_size=3), child, max_size=3),
        st.builds(lambda tag, value: {"$": tag, "v": value}, st.sampled_from(_TAGS), child),
        st.builds(lambda tag, name, value: {"$": tag, "name": name, "dtype": name, "v": value},
                  st.sampled_from(_TAGS), child, child),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=500 * SCALE)
@given(_hostile)
def test_a_hostile_document_is_refused_or_harmless(document: Any) -> None:
    try:
        unflatten(document, lambda name: np.zeros(1))
    except (FormatError, UnsupportedState):
        pass


@pytest.mark.parametrize(
    "document",
    [
        b"", b"{", b"\xff", b"NaN", b'{"a": Infinity}', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'"\\ud800', b"\0\0\0[",
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_not_json_is_refused(document: bytes) -> None:
    with pytest.raises(FormatError):
        decode_document(document)


@pytest.mark.parametrize("form", ["list", "key", "codec", "tuple"])
def test_deep_nesting_is_refused(form: str) -> None:
    document: Any = 0
    for _ in range(240):
        document = {
            "list": [document],
            "key": {"$": "dict", "v": [[document, 0]]},
            "codec": {"$": "codec", "name": "torch.Size", "v": document},
            "tuple": {"$": "tuple", "v": [document]},
        }[form]
    with pytest.raises(FormatError):
        unflatten(decode_document(json.dumps(document).encode()), str)
