"""A state tree ↔ a typed JSON document and a list of named arrays.

State dicts hold arrays, and between them numbers, strings, tuples, int-keyed dicts and the like. Arrays go to data objects; the
rest becomes one JSON document in which whatever JSON cannot say is an object with a `$` key:

    {"$": "array", "name": "model/weight", "of": "torch"}    {"$": "tuple", "v": [...]}     {"$": "dict", "v": [[key, value], ...]}
    {"$": "int", "v": "123…"} beyond ±2^53                   {"$": "float", "v": "nan"}     {"$": "bytes", "v": "base64"}
    {"$": "str", "v": "base64"} where UTF-16 surrogates stand alone
    {"$": "npscalar", "dtype": "f32", "v": "base64"}         {"$": "set" | "odict" | "counter" | "complex" | "bytearray", "v": ...}
    {"$": "codec", "name": "...", "v": ...}                  a registered type

There is no pickle and no eval: what is not listed is refused with its path and type, unless a codec is registered for it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from holdfast.checkpoint.arrays import DTYPE_BYTES, ArrayAdapter, ArraySpec, NumpyAdapter, adapter_for
from holdfast.checkpoint.collector import collector_paused
from holdfast.core.errors import FormatError, HoldfastError, UnsupportedState, UsageError

__all__ = ["FlatTree", "Leaf", "decode_document", "flatten", "register_codec", "unflatten"]

_EXACT_INT = 2**53
_MAX_DIGITS = 4000
_MAX_DEPTH = 100
_SURROGATE = re.compile("[\ud800-\udfff]")


class Leaf(NamedTuple):
    """One array of a tree. `name` is its path, `/`-separated with `~1` for `/` and `~0` for `~` inside a component; where two paths
    look the same (the keys 1 and "1"), the later one gets `~2`, `~3` and so on at its end. What is a rank's own ends in `~r<rank>`
    on all ranks but 0."""

    name: str
    value: Any
    adapter: ArrayAdapter
    spec: ArraySpec


@dataclass(frozen=True, slots=True)
class FlatTree:
    """A tree taken apart: the JSON document that says where everything goes, and the arrays it names."""

    document: bytes
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class _Codec:
    name: str
    type: type
    encode: Callable[[Any], object]
    decode: Callable[[Any], Any]


_CODECS_BY_TYPE: dict[type, _Codec] = {}
_CODECS_BY_NAME: dict[str, _Codec] = {}


def register_codec(kind: type, name: str, encode: Callable[[Any], object], decode: Callable[[Any], Any]) -> None:
    """Teach the format a type: `encode` returns a tree of types that are already known, `decode` takes that tree back.

    `name` goes into checkpoints, so it must not change. Registering the same name for another type raises UsageError.
    """
    known = _CODECS_BY_NAME.get(name)
    if known is not None and known.type is not kind:
        raise UsageError(f"the codec name {name!r} already belongs to {known.type.__qualname__}; choose another name")
    codec = _Codec(name, kind, encode, decode)
    _CODECS_BY_TYPE[kind] = codec
    _CODECS_BY_NAME[name] = codec


def _child(path: str, key: object) -> str:
    component = key if type(key) is str else str(key)
    if "~" in component or "/" in component:
        component = component.replace("~", "~0").replace("/", "~1")
    if not component.isascii():
        component = _SURROGATE.sub(lambda match: f"~{ord(match[0]):x}", component)
    return f"{path}/{component}" if path else component


def _is_plain(text: str) -> bool:
    """Whether JSON gives the same text back: surrogates that stand alone may come back joined."""
    return text.isascii() or _SURROGATE.search(text) is None


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


class _Flattener:
    def __init__(self, rank: int, is_own: Callable[[str, Any], bool]) -> None:
        self._suffix = f"~r{rank}" if rank else ""
        self._is_own = is_own
        self.leaves: list[Leaf] = []
        self._at: dict[int, list[Leaf]] = {}
        """Leaves by address: only those that begin at the same one can be the same memory."""
        self._names: set[str] = set()

    def encode(self, value: Any, path: str, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise UnsupportedState(
                f"{path[:200]}: the state is nested more than {_MAX_DEPTH} levels deep (or contains itself)"
            )
        kind = type(value)
        if kind is str:
            return value if _is_plain(value) else {"$": "str", "v": _base64(value.encode("utf-8", "surrogatepass"))}
        if kind is bool or value is None:
            return value
        if kind is int:
            return value if -_EXACT_INT <= value <= _EXACT_INT else self._encode_big_int(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
        if kind is dict:
            return self._encode_dict(value, path, depth)
        if kind is list:
            return [self.encode(item, _child(path, i), depth + 1) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$": "tuple", "v": [self.encode(item, _child(path, i), depth + 1) for i, item in enumerate(value)]}
        adapter = adapter_for(value)
        if adapter is not None:
            return self._encode_array(adapter, value, path)
        return self._encode_rare(kind, value, path, depth)

    def _encode_big_int(self, value: int, path: str) -> Any:
        if value.bit_length() > 3.32 * _MAX_DIGITS:
            raise UnsupportedState(
                f"{path or 'the state'}: an integer of more than {_MAX_DIGITS} digits cannot be stored"
            )
        return {"$": "int", "v": str(value)}

    def _encode_dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if all(type(key) is str and not key.startswith("$") and _is_plain(key) for key in value):
            return {key: self.encode(item, _child(path, key), depth + 1) for key, item in value.items()}
        return {"$": "dict", "v": self._encode_items(value, path, depth)}

    def _encode_items(self, value: Mapping[Any, Any], path: str, depth: int) -> list[Any]:
        pairs = []
        for key, item in value.items():
            if type(key) is not str and type(key) is not int:
                raise UnsupportedState(
                    f"{path or 'the state'}: a dict key of type {type(key).__qualname__} ({key!r}) cannot be stored; "
                    "use str or int keys"
                )
            pairs.append([self.encode(key, path), self.encode(item, _child(path, key), depth + 1)])
        return pairs

    def _encode_array(self, adapter: ArrayAdapter, value: Any, path: str) -> Any:
        spec = adapter.spec(path, value)
        address = adapter.address(value)
        here = self._at.get(address) if address else None
        if here is not None:
            identity = adapter.identity(value)
            for leaf in here:
                if leaf.adapter is adapter and adapter.identity(leaf.value) == identity:
                    return {"$": "array", "name": leaf.name, "of": adapter.library}
        suffix = self._suffix if self._suffix and self._is_own(path, value) else ""
        name = path + suffix
        if name in self._names:
            name = self._free_name(path, suffix)
        if name != path:
            spec = spec._replace(name=name)
        leaf = Leaf(name, value, adapter, spec)
        self._names.add(name)
        self.leaves.append(leaf)
        if here is not None:
            here.append(leaf)
        elif address:
            self._at[address] = [leaf]
        return {"$": "array", "name": name, "of": adapter.library}

    def _free_name(self, path: str, suffix: str) -> str:
        number = 2
        while f"{path}~{number}{suffix}" in self._names:
            number += 1
        return f"{path}~{number}{suffix}"

    def _encode_rare(self, kind: type, value: Any, path: str, depth: int) -> Any:
        if kind is bytes:
            return {"$": "bytes", "v": _base64(value)}
        if kind is bytearray:
            return {"$": "bytearray", "v": _base64(bytes(value))}
        if kind is complex:
            return {"$": "complex", "v": [self.encode(value.real, path), self.encode(value.imag, path)]}
        if kind is OrderedDict:
            return {"$": "odict", "v": self._encode_items(value, path, depth)}
        if kind is Counter:
            return {"$": "counter", "v": self._encode_items(value, path, depth)}
        if kind is set:
            if not all(type(item) is str or type(item) is int for item in value):
                raise UnsupportedState(f"{path or 'the state'}: only sets of str and int can be stored; use a list")
            ordered = sorted(value, key=lambda item: (type(item) is str, item))
            return {"$": "set", "v": [self.encode(item, path) for item in ordered]}
        if isinstance(value, np.generic):
            array = np.asarray(value)
            return {"$": "npscalar", "dtype": NumpyAdapter().spec(path, array).dtype, "v": _base64(array.tobytes())}
        codec = _CODECS_BY_TYPE.get(kind)
        if codec is not None:
            return {"$": "codec", "name": codec.name, "v": self.encode(codec.encode(value), path, depth + 1)}
        raise UnsupportedState(
            f"{path or 'the state'}: a value of type {kind.__module__}.{kind.__qualname__} cannot be stored. Give it "
            "state_dict()/load_state_dict() and track it, turn it into arrays, numbers, strings, lists or dicts, "
            "or teach holdfast the type with holdfast.register_codec"
        )


def _nothing(path: str, value: Any) -> bool:
    return False


def flatten(tree: object, *, rank: int = 0, is_own: Callable[[str, Any], bool] = _nothing) -> FlatTree:
    """Take `tree` apart. Arrays that are the same memory (tied weights) become one leaf.

    `is_own(path, array)` says which arrays belong to `rank` alone: their names must not be those of other ranks' arrays.
    Raises UnsupportedState, naming path and type, for anything that cannot be stored.
    """
    flattener = _Flattener(rank, is_own)
    with collector_paused():
        document = flattener.encode(tree, "")
    return FlatTree(msgspec.json.encode(document), tuple(flattener.leaves))


def decode_document(document: bytes) -> Any:
    """Parse a document to plain JSON values. Raises FormatError on anything that is not JSON."""
    try:
        return json.loads(document, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the checkpoint's state document is not valid: {type(error).__name__}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Builder:
    def __init__(self, array: Callable[[str], Any]) -> None:
        self._array = array

    def build(self, node: Any, depth: int = 0) -> Any:
        if depth > 2 * _MAX_DEPTH + 10:
            raise FormatError("the checkpoint's state document is nested too deeply")
        if isinstance(node, list):
            return [self.build(item, depth + 1) for item in node]
        if isinstance(node, dict):
            if "$" not in node:
                return {key: self.build(item, depth + 1) for key, item in node.items()}
            tag = node["$"]
            return self._build_tagged(tag, node, depth)
        return node

    def _build_tagged(self, tag: object, node: dict[str, Any], depth: int) -> Any:
        try:
            if tag == "array":
                return self._array(_text(node["name"]))
            if tag == "npscalar":
                return _numpy_scalar(_text(node["dtype"]), _bytes(node["v"]))
            if tag == "codec":
                return self._build_codec(node, depth)
            value = node["v"]
            if tag in _ITEMS:
                return _ITEMS[tag]([self._build_item(pair, depth + 1) for pair in _list(value)])
            if tag in _SEQUENCES:
                return _SEQUENCES[tag]([self.build(item, depth + 1) for item in _list(value)])
            if tag in _SCALARS:
                return _SCALARS[tag](_text(value))
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
            raise FormatError(f"the checkpoint's state document holds a broken {tag!r} entry: {error}") from error
        raise FormatError(
            f"the checkpoint's state document holds an unknown entry {tag!r}; a newer holdfast may have written it"
        )

    def _build_item(self, pair: object, depth: int) -> tuple[Any, Any]:
        key, item = _list(pair)
        built = self.build(key, depth)
        if type(built) is not str and type(built) is not int:
            raise FormatError(f"a key of type {type(built).__name__} in the checkpoint's state document")
        return built, self.build(item, depth)

    def _build_codec(self, node: dict[str, Any], depth: int) -> Any:
        codec = _CODECS_BY_NAME.get(_text(node["name"]))
        if codec is None:
            raise UnsupportedState(
                f"the checkpoint holds a value of codec {node['name']!r}, which is not registered here; "
                "call holdfast.register_codec for it before restoring"
            )
        value = self.build(node["v"], depth + 1)
        try:
            return codec.decode(value)
        except HoldfastError:
            raise
        except Exception as error:
            raise FormatError(
                f"the codec {codec.name!r} could not decode a value of the checkpoint: {error}"
            ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise FormatError(f"expected text in the checkpoint's state document, found {type(value).__name__}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"expected a list in the checkpoint's state document, found {type(value).__name__}")
    return value


def _bytes(value: object) -> bytes:
    return base64.b64decode(_text(value), validate=True)


def _special_float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise FormatError(f"not a special float: {text!r}")
    return float(text)


def _big_int(text: str) -> int:
    digits = text.removeprefix("-")
    if len(digits) > _MAX_DIGITS + 1 or not (digits.isascii() and digits.isdecimal()):
        raise FormatError(f"not an integer of at most {_MAX_DIGITS} digits")
    return int(text)


def _complex(real: object, imaginary: object) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise FormatError("a complex number consists of two floats")
    return complex(real, imaginary)


def _numpy_scalar(dtype: str, raw: bytes) -> Any:
    if dtype not in DTYPE_BYTES:
        raise FormatError(f"unknown dtype {dtype!r}")
    target = NumpyAdapter().allocate(ArraySpec("", dtype, (), (), (), "numpy"))
    return np.frombuffer(raw, dtype=target.dtype).reshape(())[()]


_ITEMS: dict[object, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "odict": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
}
_SEQUENCES: dict[object, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "complex": lambda parts: _complex(*parts),
}
_SCALARS: dict[object, Callable[[str], Any]] = {
    "str": lambda text: _bytes(text).decode("utf-8", "surrogatepass"),
    "int": _big_int,
    "float": _special_float,
    "bytes": _bytes,
    "bytearray": lambda text: bytearray(_bytes(text)),
}


def unflatten(document: Any, array: Callable[[str], Any]) -> Any:
    """Put a tree together again from a decoded document; `array(name)` returns each array.

    Raises FormatError for broken documents and UnsupportedState for codecs that are not registered.
    """
    try:
        with collector_paused():
            return _Builder(array).build(document)
    except RecursionError:
        raise FormatError("the checkpoint's state document is nested too deeply") from None
