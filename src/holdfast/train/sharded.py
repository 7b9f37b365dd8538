"""Sharded tensors at restore: what a checkpoint holds as a whole becomes what its counterpart here is, this rank's part of it.

    document + templates (the tree as it is here, or the parameters that an optimizer's state belongs to)
        → a tree with pending shards, which are read like any memory → settled: tensors that are sharded like their templates

A tree has no templates where a process shards nothing, and then nothing of this is used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from holdfast.checkpoint.arrays import adapter_for, is_sharded
from holdfast.checkpoint.regions import Rectangle
from holdfast.checkpoint.tree import unflatten
from holdfast.core.errors import FormatError

__all__ = ["Shaping", "like_parameters", "settle"]


@dataclass(frozen=True, slots=True)
class _Everywhere:
    """A template for every array below that has its shape."""

    template: Any


@dataclass(frozen=True, slots=True)
class _Pending:
    """This rank's shard, in host memory that is filled meanwhile, of a tensor that is to be sharded like `template`."""

    shard: Any
    template: Any


def like_parameters(optimizer: torch.optim.Optimizer, node: Any, places: Sequence[int] | None) -> Any:
    """Templates for an optimizer's state document: what is shaped like a parameter is sharded like it. `places`: for each parameter
    of the checkpoint its place here, if names say it."""
    here = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        numbers = [number for group in node["param_groups"] for number in group["params"]]
        pairs = zip(numbers, places or range(len(here)), strict=False)
        return {"state": {number: _Everywhere(here[place]) for number, place in pairs}}
    except (KeyError, TypeError, IndexError):
        return {}


class _Fresh(Protocol):
    """New memory for an array of the checkpoint, or for a rectangle of it."""

    def __call__(self, name: str, rectangle: Rectangle | None = None, /) -> Any: ...


class Shaping:
    """Builds a tree of which parts are sharded here."""

    def __init__(self, shape_of: Callable[[str], tuple[int, ...]], fresh: _Fresh) -> None:
        self._shape_of, self._fresh = shape_of, fresh

    def build(self, node: Any, here: Any) -> Any:
        if isinstance(node, list):
            return [self.build(item, _inside(here, index)) for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        tag = node.get("$")
        if tag is None:
            return {key: self.build(item, _inside(here, key)) for key, item in node.items()}
        if tag == "array":
            return self._array(node, here.template if isinstance(here, _Everywhere) else here)
        try:
            if tag in ("dict", "odict"):
                pairs = [(unflatten(key, self._fresh), item) for key, item in node["v"]]
                built = [(key, self.build(item, _inside(here, key))) for key, item in pairs]
                return OrderedDict(built) if tag == "odict" else dict(built)
            if tag == "tuple":
                return tuple([self.build(item, _inside(here, index)) for index, item in enumerate(node["v"])])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the checkpoint's state document holds a broken {tag!r} entry: {error}") from error
        return unflatten(node, self._fresh)

    def _array(self, node: dict[str, Any], template: Any) -> Any:
        name = node.get("name")
        if isinstance(name, str) and is_sharded(template) and tuple(template.shape) == self._shape_of(name):
            adapter = adapter_for(template)
            if adapter is not None:
                spec = adapter.spec(name, template)
                return _Pending(self._fresh(name, Rectangle(spec.offsets, spec.shape)), template)
        return unflatten(node, self._fresh)


def _inside(here: Any, key: Any) -> Any:
    if isinstance(here, _Everywhere):
        return here
    if isinstance(here, Mapping):
        return here.get(key)
    if isinstance(here, list | tuple) and isinstance(key, int) and key < len(here):
        return here[key]
    return None


def settle(tree: Any) -> Any:
    """The tree with tensors in the place of what was pending. Its memory has been read."""
    if isinstance(tree, _Pending):
        from holdfast.checkpoint.dtensors import sharded_like

        return sharded_like(tree.template, tree.shard)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, settle(item)) for key, item in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(settle(item) for item in tree)
    return tree
