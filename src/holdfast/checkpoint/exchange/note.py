"""The form that a state has on its way between a checkpoint and other tools' files.

    checkpoint → Outgoing → safetensors, torch, DCP        (export.py)
    safetensors, torch, DCP → Incoming → checkpoint        (adopt.py)

Other tools' files hold named arrays, and beside them less than a state tree can say. What they cannot say travels in a `Note`: the
state document as JSON, whose arrays are named as in the file. A file with its note comes back exactly as it was; a file without one
(somebody else's, or a bare one) is what its own format says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from holdfast.checkpoint.arrays import ArraySpec
from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.read import CheckpointReader
from holdfast.checkpoint.tree import FlatTree, decode_document, unflatten
from holdfast.core.errors import FormatError, RunConflict, UsageError

__all__ = [
    "FORMATS",
    "NOTE_FORMAT",
    "NOTE_KEY",
    "ArrayPath",
    "Format",
    "Found",
    "Incoming",
    "IncomingArray",
    "Note",
    "Outgoing",
    "array_nodes",
    "choose_objects",
    "incoming_from_note",
    "incoming_from_tree",
    "outgoing",
    "own_state",
    "read_note",
    "without_codecs",
    "write_note",
]

Format = Literal["safetensors", "torch", "dcp"]
FORMATS: tuple[Format, ...] = get_args(Format)
NOTE_FORMAT = 1
NOTE_KEY = "holdfast.json"
"""Where torch and DCP files hold the note. Tracked names are identifiers, so none of them is called this."""
ArrayPath = tuple[str | int, ...]
"""Keys and indices that lead from the tracked objects to one array."""

_LIBRARIES = ("torch", "numpy")
_KEYED = ("dict", "odict", "counter")


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What an exported file says about itself. `state` is the document of the objects in it, by tracked name; `parameters` names
    the parameters that optimizers know by number only; with `bare`, paths in the file begin inside the one object."""

    format: int
    run_id: str
    checkpoint: str
    step: int
    epoch: int
    bare: bool
    state: dict[str, Any]
    parameters: dict[str, list[tuple[int, str, list[int]]]]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What of a checkpoint is exported. `arrays` are named as the file names them, tied ones once; `aliases` are the other names of
    tied ones. The note's state refers to the keys of `arrays`."""

    arrays: dict[str, Assembled]
    aliases: dict[str, str]
    note: Note

    @property
    def total_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Found(NamedTuple):
    """One array in a file: what it is, and its bytes [start, start + length) on demand."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], memoryview]


class IncomingArray(NamedTuple):
    """One array on its way into a checkpoint."""

    spec: ArraySpec
    read: Callable[[int, int], memoryview]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A state on its way into a checkpoint. `left_out` are the file's entries that were not taken."""

    document: bytes
    arrays: tuple[IncomingArray, ...]
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()


# ---- documents


def array_nodes(node: Any, path: ArrayPath = ()) -> Iterator[tuple[ArrayPath, dict[str, Any]]]:
    """Every array of a decoded document with its path, in the order of the document. The nodes are those of the document itself."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from array_nodes(item, (*path, index))
    elif isinstance(node, dict):
        tag = node.get("$")
        if tag is None:
            for key, item in node.items():
                yield from array_nodes(item, (*path, key))
        elif tag == "array":
            yield path, node
        elif tag in _KEYED:
            for key, item in node["v"]:
                yield from array_nodes(item, (*path, unflatten(key, _no_array)))
        elif tag in ("tuple", "codec"):
            yield from array_nodes(node["v"], path)


def without_codecs(node: Any, keep: Sequence[str] = ()) -> Any:
    """A decoded document with what registered types are made of in their place, so that it means something without them."""
    if isinstance(node, list):
        return [without_codecs(item, keep) for item in node]
    if isinstance(node, dict):
        if node.get("$") == "codec" and node.get("name") not in keep:
            return without_codecs(node.get("v"), keep)
        return {key: without_codecs(item, keep) for key, item in node.items()}
    return node


def _no_array(name: str) -> Any:
    raise FormatError(f"the array {name!r} stands where a key would")


def own_state(step: int, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `holdfast` subtree of an imported checkpoint. It has no position and no random generators: whoever restores it begins at
    the start of the loop, counting steps from `step`."""
    return {"step": step, **({"parameters": dict(parameters)} if parameters else {})}


# ---- going out


def outgoing(reader: CheckpointReader, only: Sequence[str] = (), *, bare: bool = False) -> Outgoing:
    """The tracked objects of a checkpoint (those in `only`, or all), under the names that they get in a file.

    With `bare`, names begin inside the one chosen object. Raises UsageError for a name that is not tracked, FormatError when the
    document is broken.
    """
    document = decode_document(reader.document())
    tracked = document.get("tracked") if isinstance(document, dict) else None
    if not isinstance(tracked, dict):
        raise FormatError("the checkpoint's state document does not hold tracked objects")
    chosen = choose_objects(tracked, only, what="the checkpoint")
    if bare and (len(chosen) != 1 or "$" in next(iter(chosen.values()))):
        raise UsageError("a bare file holds one object that is a plain dict: name it with `only`")
    _check_document(chosen)
    arrays: dict[str, Assembled] = {}
    aliases: dict[str, str] = {}
    flat: dict[str, str] = {}
    taken = {"__metadata__"}
    for path, node in array_nodes(chosen):
        array = reader.arrays.get(node["name"])
        if array is None:
            raise FormatError(
                f"the checkpoint's document names the array {node['name']!r}, which its index does not hold"
            )
        name = _free_name(".".join(map(str, path[1:] if bare else path)), taken)
        known = flat.setdefault(array.name, name)
        if known == name:
            arrays[name] = array
        else:
            aliases[name] = known
        node["name"] = known
    own = document.get("holdfast")
    note = Note(
        format=NOTE_FORMAT, run_id=reader.root.run_id, checkpoint=reader.ref.name, step=reader.ref.step,
        epoch=reader.ref.epoch, bare=bare, state=chosen, parameters=_parameters(own, chosen),
    )  # fmt: skip
    return Outgoing(arrays, aliases, note)


def choose_objects(state: Mapping[str, Any], only: Sequence[str], *, what: str) -> dict[str, Any]:
    missing = [name for name in only if name not in state]
    if missing:
        raise UsageError(f"{what} does not hold {', '.join(missing)}; it holds {', '.join(state) or 'nothing'}")
    return {name: tree for name, tree in state.items() if not only or name in only}


def _free_name(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}~{number}", number + 1
    taken.add(name)
    return name


def _parameters(own: Any, chosen: Mapping[str, Any]) -> dict[str, list[tuple[int, str, list[int]]]]:
    """What the loop's own state says about optimizers' parameters; nothing where it says it in another way than is known here."""
    saved = own.get("parameters") if isinstance(own, dict) else None
    if not isinstance(saved, dict):
        return {}
    try:
        return msgspec.convert(
            {name: members for name, members in saved.items() if name in chosen},
            dict[str, list[tuple[int, str, list[int]]]],
        )
    except msgspec.ValidationError:
        return {}


def write_note(note: Note) -> str:
    return json.dumps(msgspec.to_builtins(note), separators=(",", ":"), allow_nan=False)


# ---- coming in


def read_note(text: object, *, what: str) -> Note:
    """Check everything in a note before anything is made of it: the file may come from anywhere.

    Raises FormatError, and RunConflict when a newer holdfast has written it.
    """
    if not isinstance(text, str):
        raise FormatError(f"{what}: holdfast's note in it is not text")
    try:
        raw = json.loads(text)
        version = raw.get("format") if isinstance(raw, dict) else None
        if type(version) is int and version > NOTE_FORMAT:
            raise RunConflict(f"{what}: written by a newer holdfast (note of format {version}). Update holdfast")
        note = msgspec.convert(raw, Note)
        _check_document(note.state)
    except (ValueError, RecursionError, msgspec.ValidationError, FormatError) as error:
        raise FormatError(f"{what}: holdfast's note in it is not valid: {error}") from None
    if note.format != NOTE_FORMAT or not all(name.isidentifier() for name in note.state):
        raise FormatError(f"{what}: holdfast's note in it is not valid")
    if note.bare and len(note.state) != 1:
        raise FormatError(f"{what}: holdfast's note in it does not name the one object of the file")
    return note


def _check_document(document: Any) -> None:
    """Raises FormatError for anything that a restore would stumble over, and for arrays of no known library."""
    try:
        named: set[str] = set()
        unflatten(without_codecs(document), named.add)
        nodes = [node for _, node in array_nodes(document)]
        misplaced = named - {node["name"] for node in nodes}
        strange = [node.get("of") for node in nodes if node.get("of") not in _LIBRARIES]
        if misplaced or strange:
            raise FormatError(
                f"the array {min(misplaced)!r} stands where none can be"
                if misplaced
                else f"an array of the library {strange[0]!r}"
            )
    except RecursionError:
        raise FormatError("the state document is nested too deeply") from None


def incoming_from_note(
    note: Note, names: Sequence[str], rename: str | None, find: Callable[[ArrayPath, str], Found], *, step: int
) -> Incoming:
    """The objects called `names` as the note describes them; `find` gives each array by its path in the file and its name there.

    `rename` is the name that a single object gets instead of its own.
    """
    state = {rename or name: note.state[name] for name in names}
    arrays: dict[str, IncomingArray] = {}
    known: dict[str, str] = {}
    taken: set[str] = set()
    for original, node in zip(names, state.values(), strict=True):
        for inside, item in array_nodes(node):
            flat = item["name"]
            if flat not in known:
                found = find(inside if note.bare else (original, *inside), flat)
                name = _free_name("/".join(map(_escaped, ("tracked", rename or original, *inside))), taken)
                spec = ArraySpec(name, found.dtype, found.shape, found.shape, (0,) * len(found.shape), item["of"])
                arrays[name] = IncomingArray(spec, found.read)
                known[flat] = name
            item["name"] = known[flat]
    parameters = {rename or name: note.parameters[name] for name in names if name in note.parameters}
    document = {"tracked": state, "holdfast": own_state(step, parameters)}
    left_out = tuple(name for name in note.state if name not in names)
    encoded = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Incoming(encoded, tuple(arrays.values()), tuple(state), left_out)


def incoming_from_tree(flat: FlatTree, names: Sequence[str], left_out: Sequence[str] = ()) -> Incoming:
    """A tree that has been taken apart (with `own_state` in it), its arrays read from where they are."""

    def reading(adapter: Any, value: Any) -> Callable[[int, int], memoryview]:
        def read(start: int, length: int) -> memoryview:
            data: memoryview = adapter.stream(value, start, length)
            return data

        return read

    arrays = tuple(IncomingArray(leaf.spec, reading(leaf.adapter, leaf.value)) for leaf in flat.leaves)
    return Incoming(flat.document, arrays, tuple(names), tuple(left_out))


def _escaped(key: str | int) -> str:
    """A component of an array's name: as tree.py writes them."""
    text = str(key).replace("~", "~0").replace("/", "~1")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
