"""What a run ended with, and where two of them differ: checkpoint against checkpoint, array by array, without torch.

    newest checkpoint → document → leaves by name ─┐
    newest checkpoint → document → leaves by name ─┴→ equal block hashes? else both arrays' bytes → differences

Arrays whose block hashes agree are not read, so that two states of many GiB that are equal cost two indexes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.format import Head
from holdfast.checkpoint.read import CheckpointReader, Target, open_checkpoint
from holdfast.checkpoint.runs.inspect import current_checkpoints, read_run
from holdfast.checkpoint.tree import decode_document
from holdfast.core.errors import FormatError, RestoreError
from holdfast.store.base import Store

__all__ = ["CLOCK", "GENERATORS", "Difference", "FinalState", "compare", "drawn_from", "newest_state"]

GENERATORS = "random generators"
"""Under this name the global random generators are compared."""
CLOCK = "wall_clock"
"""What a tracked object keeps under this key is time that has passed: no two runs have it in common, and it is not compared."""
_OWN = {"step": "step", "position": "position", "seed": "seed", "rng": GENERATORS}
_NUMPY = {
    "bool": "?", "u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8",
    "f16": "<f2", "f32": "<f4", "f64": "<f8", "c64": "<c8", "c128": "<c16",
}  # fmt: skip
_SHOWN_CHARACTERS = 60
_FRESH = (623, 624)
"""Where a Mersenne Twister stands when it has just been seeded: by numpy itself, or by a number that somebody gave."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One leaf that is not the same. `spread` is the greatest difference over the greatest magnitude; infinite where the leaf is
    no number, has another shape, or is missing."""

    name: str
    text: str
    spread: float


@dataclass(frozen=True, slots=True)
class FinalState:
    """A run's newest checkpoint, opened. `leaves` are arrays and plain values by name."""

    head: Head
    step: int
    reader: CheckpointReader
    leaves: Mapping[str, Any]


def newest_state(store: Store) -> FinalState:
    """Raises UsageError when there is no run, RestoreError when it has no checkpoint, IntegrityError when that does not verify."""
    head = read_run(store).head
    refs = current_checkpoints(head)
    if not refs:
        raise RestoreError(f"{store.url}: the run has no checkpoint")

    def no_home(url: str) -> Store:
        raise FormatError(f"{store.url}: refers to another run ({url})")

    reader = open_checkpoint(store, refs[-1], no_home)
    leaves = _leaves_of(reader, 0)
    seen = {id(leaf) for leaf in leaves.values()}
    for rank in range(1, len(reader.parts)):
        # What all ranks have in common is compared once.
        mine = {name: leaf for name, leaf in _leaves_of(reader, rank).items() if id(leaf) not in seen}
        seen |= {id(leaf) for leaf in mine.values()}
        leaves |= {f"{name} of rank {rank}": leaf for name, leaf in mine.items()}
    return FinalState(head, refs[-1].step, reader, leaves)


def _leaves_of(reader: CheckpointReader, rank: int) -> dict[str, Any]:
    document = decode_document(reader.document(rank))
    own = document.get("holdfast") or {}
    leaves = dict(_leaves(document.get("tracked") or {}, "", reader))
    leaves = {
        _with_parameter(name, own.get("parameters") or {}): leaf
        for name, leaf in leaves.items()
        if name.split(".")[1:2] != [CLOCK]
    }
    for key, name in _OWN.items():
        leaves |= dict(_leaves(own.get(key), name, reader))
    return leaves


def _leaves(node: Any, path: str, reader: CheckpointReader) -> Iterator[tuple[str, Any]]:
    items = _items(node)
    if isinstance(node, dict) and node.get("$") == "array":
        array = reader.arrays.get(str(node.get("name")))
        if array is None:
            raise FormatError(f"{path}: the index does not hold its array")
        yield path, array
    elif items is None or (isinstance(node, list) and not any(isinstance(item, dict | list) for item in node)):
        yield path, node
    else:
        for key, item in items:
            yield from _leaves(item, f"{path}.{key}" if path else str(key), reader)


def _items(node: Any) -> list[tuple[Any, Any]] | None:
    """What a container of a document holds; None for a leaf."""
    if isinstance(node, list):
        return list(enumerate(node))
    if not isinstance(node, dict):
        return None
    if "$" not in node:
        return list(node.items())
    value = node.get("v")
    if node["$"] in ("dict", "odict", "counter") and isinstance(value, list):
        return [(pair[0], pair[1]) for pair in value]
    if node["$"] == "tuple" and isinstance(value, list):
        return list(enumerate(value))
    return None


def _with_parameter(name: str, parameters: Mapping[str, Any]) -> str:
    """An optimizer knows its parameters by number; people know them by name."""
    owner, _, rest = name.partition(".state.")
    number = rest.partition(".")[0]
    known = parameters.get(owner) or []
    if rest and number.isdecimal() and int(number) < len(known) and known[int(number)][1]:
        return f"{name} ({known[int(number)][1]})"
    return name


def compare(one: FinalState, other: FinalState) -> list[Difference]:
    """Every leaf that differs, in the order of the state."""
    found: list[Difference] = []
    with ThreadPoolExecutor(2, thread_name_prefix="holdfast-drill") as pool:
        for name in [*one.leaves, *(name for name in other.leaves if name not in one.leaves)]:
            if name not in one.leaves or name not in other.leaves:
                which = "second" if name in other.leaves else "first"
                found.append(Difference(name, f"only the {which} has it", math.inf))
                continue
            mine, theirs = one.leaves[name], other.leaves[name]
            if isinstance(mine, Assembled) and isinstance(theirs, Assembled):
                difference = _compare_arrays(name, one.reader, mine, other.reader, theirs, pool)
            else:
                difference = _compare_values(name, mine, theirs)
            if difference is not None:
                found.append(difference)
    return found


def drawn_from(state: FinalState) -> frozenset[str]:
    """Which of python's and numpy's global generators somebody has drawn from since they were seeded. A Mersenne Twister that is
    fresh stands at the end of its words; one that was used does but once in 624 draws."""
    used = set()
    if state.leaves.get(f"{GENERATORS}.numpy.position") not in _FRESH:
        used.add("numpy")
    words = state.leaves.get(f"{GENERATORS}.python.words")
    if isinstance(words, Assembled):
        held = bytearray(words.nbytes)
        with ThreadPoolExecutor(1, thread_name_prefix="holdfast-drill") as pool:
            state.reader.read([Target(words, memoryview(held))], pool)
        if int.from_bytes(held[-4:], "little") not in _FRESH:
            used.add("python")
    return frozenset(used)


def _compare_arrays(
    name: str,
    reader: CheckpointReader,
    mine: Assembled,
    other: CheckpointReader,
    theirs: Assembled,
    pool: ThreadPoolExecutor,
) -> Difference | None:
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return Difference(name, f"{_form(mine)} and {_form(theirs)}", math.inf)
    if mine.content() == theirs.content():
        return None
    ours, others = bytearray(mine.nbytes), bytearray(theirs.nbytes)
    reader.read([Target(mine, memoryview(ours))], pool)
    other.read([Target(theirs, memoryview(others))], pool)
    if ours == others:
        return None
    a, b = _numbers(mine.dtype, ours), _numbers(mine.dtype, others)
    if a is None or b is None:
        return Difference(name, f"{_form(mine)}: the bytes differ", math.inf)
    count = int(np.count_nonzero(~((a == b) | ((a != a) & (b != b)))))
    gap, spread = _gap(a, b)
    if mine.dtype[0] not in "fbc" or mine.dtype == "bool":
        # A counter, an index, a generator's state: no distance means anything.
        spread = math.inf
    return Difference(name, f"{_form(mine)}: {count} of {a.size} elements differ, by {gap:.3g} at most", spread)


def _numbers(dtype: str, data: bytearray) -> npt.NDArray[Any] | None:
    if dtype == "bf16":
        wide = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").astype(np.float64)
    if dtype not in _NUMPY:
        return None
    array: npt.NDArray[Any] = np.frombuffer(data, dtype=_NUMPY[dtype])
    return array.astype(np.complex128 if dtype[0] == "c" else np.float64)


def _gap(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[float, float]:
    """The greatest difference, and that over the greatest magnitude. Where only one is a number both are infinite."""
    same = (a == b) | ((a != a) & (b != b))
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.where(same, 0.0, np.abs(a - b))
        gap = float(np.max(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf), initial=0.0))
        finite = np.concatenate([np.abs(a[np.isfinite(a)]), np.abs(b[np.isfinite(b)])])
    whole = float(np.max(finite, initial=0.0))
    return gap, gap / whole if whole else math.inf


def _compare_values(name: str, mine: Any, theirs: Any) -> Difference | None:
    if type(mine) is type(theirs) and mine == theirs:
        return None
    if isinstance(mine, list) and isinstance(theirs, list):
        pairs = zip(mine, theirs, strict=False)
        first = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
        at = f"first at index {first}" if len(mine) == len(theirs) else f"the same up to index {first}"
        return Difference(name, f"{len(mine)} and {len(theirs)} values, {at}", math.inf)
    if isinstance(mine, float) and isinstance(theirs, float):
        whole = max(abs(mine), abs(theirs))
        return Difference(name, f"{mine:.9g} and {theirs:.9g}", abs(mine - theirs) / whole)
    return Difference(name, f"{_short(mine)} and {_short(theirs)}", math.inf)


def _short(value: Any) -> str:
    text = "an array" if isinstance(value, Assembled) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _form(array: Assembled) -> str:
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
