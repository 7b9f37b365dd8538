"""From a verified checkpoint into the tracked objects: all of them, from one checkpoint, or none.

Everything that can be compared without reading tensor data is compared first, for every object, so that one error lists all that
does not fit. Then the bytes go straight into the tensors (those of modules and arrays into their own memory), each block verified,
and `load_state_dict` is called so that its hooks run. Of what is sharded here each rank reads its own rectangle, however many ranks
wrote the checkpoint and however it was sharded there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.checkpoint.arrays import ArrayAdapter, ArraySpec, adapter_for, adapter_named
from holdfast.checkpoint.arrays import is_sharded as is_sharded_array
from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.read import CheckpointReader, Target
from holdfast.checkpoint.regions import Rectangle
from holdfast.checkpoint.tree import decode_document, unflatten
from holdfast.core.errors import FormatError, TrackedStateMismatch
from holdfast.train.optimizers import fit_optimizer, match_by_name, reordered
from holdfast.train.sharded import Shaping, like_parameters, settle
from holdfast.train.tracked import Tracked, Tracker

__all__ = ["Loaded", "load_checkpoint", "read_tree"]

_SHOWN_DIFFERENCES = 40
_FIXED_KEYS = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_RETIRED_KEYS = {"verbose"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came out of a checkpoint beside the tracked objects: holdfast's own state, what was left out under `strict=False`, and
    which tracked objects an imported checkpoint does not hold, so that they stay as the script made them."""

    own: dict[str, Any]
    skipped: tuple[str, ...]
    untouched: tuple[str, ...] = ()

    @property
    def imported(self) -> bool:
        """Whether the checkpoint came from another tool's file: it knows nothing of a loop."""
        return "position" not in self.own


@dataclass(slots=True)
class _Destination:
    """Memory that an array of the checkpoint, or this rank's `rectangle` of it, is read into, and where it goes from there
    (nowhere: it is already there)."""

    stored: Assembled
    array: Any
    rectangle: Rectangle | None = None
    is_live: bool = False
    assign_to: list[Any] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return self.stored.nbytes == 0 if self.rectangle is None else self.rectangle.size == 0


_Destinations = dict[tuple[str, Rectangle | None], _Destination]


def read_tree(reader: CheckpointReader, pool: ThreadPoolExecutor, document: Any) -> Any:
    """The tree behind a (part of a) decoded document, its arrays read into fresh memory and verified."""
    made: dict[str, Any] = {}

    def array(name: str) -> Any:
        if name not in made:
            stored = _stored(reader, name)
            made[name] = adapter_named(stored.library).allocate(stored.spec())
        return made[name]

    tree = unflatten(document, array)
    found = [(_stored(reader, name), value) for name, value in made.items()]
    reader.read([Target(stored, _memory(value)) for stored, value in found if stored.nbytes], pool)
    return tree


def load_checkpoint(
    reader: CheckpointReader,
    tracker: Tracker,
    pool: ThreadPoolExecutor,
    *,
    strict: bool,
    progress: Callable[[int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
    prepare: Callable[[CheckpointReader, Sequence[Target], ThreadPoolExecutor], None] | None = None,
) -> Loaded:
    """Make every tracked object equal to the checkpoint, as `rank` of `world_size` had it; or rank 0, if another number of ranks
    wrote it. What is sharded is read as it is sharded here. `prepare` is called once it is known what is wanted.

    Raises TrackedStateMismatch (before anything has changed) listing every difference; with `strict=False` what fits is loaded
    and the rest is returned in `skipped`. Raises IntegrityError when bytes do not verify: the objects then hold undefined
    values, and the caller goes on to another checkpoint or gives up.
    """
    document = decode_document(reader.document(rank if reader.root.world_size == world_size else 0))
    if not isinstance(document, dict) or not isinstance(document.get("tracked"), dict):
        raise FormatError("the checkpoint's state document does not hold tracked objects")
    saved: dict[str, Any] = document["tracked"]
    own = read_tree(reader, pool, document.get("holdfast")) or {}
    untouched = [name for name in tracker.names() if name not in saved] if "position" not in own else []
    differences = _missing(saved, tracker, untouched)
    plan: list[tuple[Tracked, Any]] = []
    destinations: _Destinations = {}
    parameters, is_sharded = tracker.parameters(), tracker.is_sharded
    for name, tracked in tracker:
        if name not in saved:
            continue
        before, now = own.get("parameters", {}).get(name), parameters.get(name)
        places = match_by_name(before, now) if before and now else None
        templates = _templates(tracked, saved[name], places) if is_sharded else None
        tree = _plan_object(reader, tracked, name, saved[name], destinations, differences, templates)
        if now is not None:
            if before is not None and places is not None:
                tree, before = reordered(tree, before, now, places)
            tree = fit_optimizer(name, tree, before, now, differences)
        elif isinstance(tracked.subject, _FIXED_KEYS):
            tree = _fit_keys(name, tree, tracked.state(), differences)
        if tree is not None:
            plan.append((tracked, tree))
    if strict and differences:
        raise _mismatch(reader, differences)
    wanted = [
        Target(item.stored, _memory(item.array), item.rectangle) for item in destinations.values() if not item.is_empty
    ]
    if prepare is not None:
        prepare(reader, wanted, pool)
    reader.read(wanted, pool, progress)
    for item in destinations.values():
        for target in item.assign_to:
            _adapter(item.array if is_sharded_array(item.array) else target).assign(target, item.array)
    for tracked, tree in plan:
        _load(tracked, settle(tree) if is_sharded else tree, tracker)
    return Loaded(own, tuple(differences), tuple(untouched))


def _load(tracked: Tracked, tree: Any, tracker: Tracker) -> None:
    try:
        tracked.load(tree)
    except Exception as error:
        name = next(name for name, other in tracker if other is tracked)
        raise TrackedStateMismatch(
            f"{name}: {type(tracked.subject).__qualname__} refuses the state in the checkpoint: {error}. The tracked objects "
            "may hold undefined values. Was it made with other arguments when the checkpoint was saved? Otherwise start over "
            "with fresh=True",
            [f"{name}: {error}"],
        ) from error


def _missing(saved: dict[str, Any], tracker: Tracker, untouched: Sequence[str]) -> list[str]:
    names = tracker.names()
    lost = [f"{name}: is in the checkpoint, but the script no longer tracks it" for name in saved if name not in names]
    new = [f"{name}: is tracked, but not in the checkpoint" for name in names if name not in {*saved, *untouched}]
    return lost + new


def _plan_object(
    reader: CheckpointReader,
    tracked: Tracked,
    name: str,
    node: Any,
    destinations: _Destinations,
    differences: list[str],
    templates: Any,
) -> Any:
    """The tree to hand to `tracked.load`, with arrays that are still to be filled. Differences are appended. `templates`, if there
    are any: the tree in which sharded tensors say what their counterparts are to be like."""
    fixed = isinstance(tracked.subject, torch.nn.Module) or adapter_for(tracked.subject) is not None
    current = tracked.state() if fixed else None
    own = dict(_arrays(current, ()))
    if fixed and isinstance(node, dict) and isinstance(current, dict) and "$" not in node:
        node = _fit_module(reader, name, node, current, differences)

    def array(array_name: str, rectangle: Rectangle | None = None) -> Any:
        stored = _stored(reader, array_name)
        known = destinations.get((array_name, rectangle))
        if known is not None and not known.is_live:
            return known.array
        made = adapter_named(stored.library).allocate(_spec(stored, rectangle))
        if known is None:
            destinations[array_name, rectangle] = _Destination(stored, made, rectangle)
        else:
            # The bytes are also some module's own memory, which this object must not come to share.
            known.assign_to.append(made)
        return made

    if templates is None:
        tree = _Placing(reader, own if fixed else {}, destinations, array).build(node)
    else:
        tree = Shaping(lambda array_name: _stored(reader, array_name).shape, array).build(node, templates)
    if fixed and not isinstance(tracked.subject, torch.nn.Module):
        _compare(reader, name, node, tracked.subject, differences)
    return tree


def _fit_keys(name: str, tree: Any, current: Any, differences: list[str]) -> Any:
    """A scheduler or scaler of another kind, or one that was off, has other keys. Private ones change with torch's versions."""
    saved, here = ({key for key in side if not key.startswith("_")} for side in (tree, current))
    if saved - _RETIRED_KEYS == here - _RETIRED_KEYS:
        return tree
    differences.extend(f"{name}.{key}: is in the checkpoint, but not here" for key in sorted(saved - here))
    differences.extend(f"{name}.{key}: is here, but not in the checkpoint" for key in sorted(here - saved))
    return None


class _Placing:
    """Builds an object's tree; arrays that the object already has memory for are read into it."""

    def __init__(
        self,
        reader: CheckpointReader,
        own: dict[tuple[Any, ...], Any],
        destinations: _Destinations,
        fresh: Callable[[str], Any],
    ) -> None:
        self._reader, self._own, self._destinations, self._fresh = reader, own, destinations, fresh

    def build(self, node: Any) -> Any:
        if isinstance(node, dict) and "$" not in node:
            return {key: self._place((key,), item) for key, item in node.items()}
        return self._place((), node)

    def _place(self, path: tuple[Any, ...], node: Any) -> Any:
        if not (isinstance(node, dict) and node.get("$") == "array"):
            return unflatten(node, self._fresh)
        name, target = node["name"], self._own.get(path)
        adapter = adapter_for(target)
        if target is None or adapter is None:
            return self._fresh(name)
        stored = _stored(self._reader, name)
        rectangle = None
        if adapter.holders(target) is not None:
            spec = adapter.spec(name, target)
            rectangle = Rectangle(spec.offsets, spec.shape)
        known = self._destinations.get((name, rectangle))
        if known is not None:
            # Tied here or there: the same bytes may have to reach several tensors.
            if _adapter(known.array).identity(known.array) != adapter.identity(target):
                known.assign_to.append(target)
        elif adapter.writable(target) is not None:
            self._destinations[name, rectangle] = _Destination(stored, target, rectangle, is_live=True)
        else:
            made = adapter_named(stored.library).allocate(_spec(stored, rectangle))
            self._destinations[name, rectangle] = _Destination(stored, made, rectangle, assign_to=[target])
        return target


def _fit_module(
    reader: CheckpointReader, name: str, node: dict[str, Any], current: dict[str, Any], differences: list[str]
) -> dict[str, Any]:
    """Compare a module's saved entries with its own; what does not fit is reported and left out."""
    fitting = {}
    for key, item in node.items():
        if key not in current:
            differences.append(f"{name}.{key}: is in the checkpoint, but the module does not have it")
        elif not _compare(reader, f"{name}.{key}", item, current[key], differences):
            continue
        else:
            fitting[key] = item
    differences.extend(f"{name}.{key}: the module has it, but not the checkpoint" for key in current if key not in node)
    return fitting


def _compare(reader: CheckpointReader, label: str, item: Any, value: Any, differences: list[str]) -> bool:
    adapter = adapter_for(value)
    is_array = isinstance(item, dict) and item.get("$") == "array"
    if adapter is None or not is_array:
        if (adapter is None) != (not is_array):
            differences.append(f"{label}: is an array on one side and a plain value on the other")
            return False
        return True
    saved, here = _stored(reader, item["name"]), adapter.spec(label, value)
    if (saved.shape, saved.dtype) == (here.global_shape, here.dtype):
        return True
    before, now = _form(saved.dtype, saved.shape), _form(here.dtype, here.global_shape)
    differences.append(f"{label}: {before} in the checkpoint, {now} here")
    return False


def _form(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _mismatch(reader: CheckpointReader, differences: list[str]) -> TrackedStateMismatch:
    shown = differences[:_SHOWN_DIFFERENCES]
    more = len(differences) - len(shown)
    lines = "\n".join(f"  {line}" for line in shown) + (f"\n  … and {more} more" if more else "")
    return TrackedStateMismatch(
        f"the checkpoint of step {reader.ref.step} does not fit the tracked objects:\n{lines}\n"
        "Nothing has been loaded. Track what the checkpoint holds, use another URL or fresh=True for another experiment, "
        "or pass strict=False to load what fits",
        differences,
    )


def _stored(reader: CheckpointReader, name: str) -> Assembled:
    stored = reader.find(name)
    if stored is None:
        raise FormatError(f"the checkpoint's document names the array {name!r}, which its index does not hold")
    return stored


def _spec(stored: Assembled, rectangle: Rectangle | None) -> ArraySpec:
    whole = stored.spec()
    return whole if rectangle is None else whole._replace(shape=rectangle.shape, offsets=rectangle.offsets)


def _templates(tracked: Tracked, node: Any, places: list[int] | None) -> Any:
    """What says how an object's state is sharded here, for objects whose state is not their own memory; None where nothing is."""
    if isinstance(tracked.subject, torch.nn.Module) or adapter_for(tracked.subject) is not None:
        return None
    if isinstance(tracked.subject, torch.optim.Optimizer):
        return like_parameters(tracked.subject, node, places)
    return None if isinstance(tracked.subject, torch.utils.data.DataLoader) else tracked.state()


def _arrays(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if adapter_for(value) is not None:
        yield path, value
    elif isinstance(value, dict) and not path:
        for key, item in value.items():
            yield from _arrays(item, (*path, key))


def _adapter(value: Any) -> ArrayAdapter:
    adapter = adapter_for(value)
    if adapter is None:
        raise FormatError("no memory to read an array into")
    return adapter


def _memory(value: Any) -> memoryview:
    adapter = adapter_for(value)
    memory = adapter.writable(value) if adapter is not None else None
    if memory is None:
        raise FormatError("no memory to read an array into")
    return memory
