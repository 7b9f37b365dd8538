"""What a user tracks, seen as state trees with canonical names.

Anything with `state_dict` / `load_state_dict` is tracked through these; arrays, dicts, lists and random generators are tracked
directly. Wrappers are looked through, so that a checkpoint does not depend on them: DDP's `module.`, `torch.compile`'s
`_orig_mod.`, Accelerate's optimizer and scheduler. An Accelerator stands for all that it holds (accelerate/). Tracking registers
only; nothing is read or written before `restore`.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data

from holdfast.checkpoint.arrays import can_be_sharded, is_sharded
from holdfast.checkpoint.snapshot import lay_out
from holdfast.checkpoint.tree import flatten
from holdfast.core.errors import UsageError
from holdfast.train.accelerate import AcceleratorState, is_accelerator, is_from_accelerate, refuse_strategy

__all__ = ["Tracked", "Tracker", "unwrap"]

_NAME_LIMIT = 100
_COMPILED = "_orig_mod"
_DRIVEN = "position is kept by run.batches"
_PARALLEL = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
_Random = random.Random | np.random.Generator | np.random.RandomState | torch.Generator


class Tracked(Protocol):
    """One tracked object. `state` gives its tree; `load` takes one of the same form and makes the object equal to it.

    The arrays in the tree that `state` returns may be the object's own memory: restore reads straight into them.
    """

    subject: Any

    def state(self) -> Any: ...

    def load(self, tree: Any) -> None: ...

    def describe(self) -> Any:
        """JSON that tells this kind of object from others, for the run's identity."""
        ...


def unwrap(subject: Any) -> Any:
    """The object behind wrappers that only add behaviour: compiled modules, data-parallel modules, Accelerate's optimizer."""
    while True:
        if isinstance(subject, torch.nn.Module) and isinstance(subject._modules.get(_COMPILED), torch.nn.Module):
            subject = subject._modules[_COMPILED]
        elif isinstance(subject, _PARALLEL):
            subject = subject.module
        elif is_from_accelerate(subject) and hasattr(subject, "scheduler"):
            subject = subject.scheduler
        elif is_from_accelerate(subject) and hasattr(subject, "optimizer"):
            refuse_strategy(getattr(subject, "accelerator_state", None))
            subject = subject.optimizer
        else:
            return subject


def _canonical(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != _COMPILED)


class _Module:
    """A torch module; parts of it may be wrapped on their own, so keys are made canonical and mapped back at load.

    Metrics of torchmetrics are modules that leave their state out of `state_dict` unless told otherwise: they are told.
    """

    def __init__(self, subject: torch.nn.Module) -> None:
        self.subject = subject
        parts = list(subject.named_modules())
        self._wrappers = sorted(
            (f"{name}." for name, part in parts if isinstance(part, _PARALLEL)), key=len, reverse=True
        )
        self._metrics = {f"{_canonical(name)}._update_count": part for name, part in parts if _is_metric(part)}
        for metric in self._metrics.values():
            metric.persistent(True)

    def _name(self, key: str) -> str:
        for prefix in self._wrappers:
            if key.startswith(prefix):
                key = prefix + key[len(prefix) :].removeprefix("module.")
        return _canonical(key)

    def state(self) -> dict[str, Any]:
        tree = {self._name(key): value for key, value in self.subject.state_dict().items()}
        return tree | {key: metric._update_count for key, metric in self._metrics.items()}

    def load(self, tree: Any) -> None:
        own = {self._name(key): key for key in self.subject.state_dict()}
        arrays = {own.get(key, key): value for key, value in tree.items() if key not in self._metrics}
        self.subject.load_state_dict(arrays, strict=False)
        for key, metric in self._metrics.items():
            metric._update_count = tree.get(key, metric._update_count)
            metric._computed = None

    def parameters(self) -> dict[int, str]:
        """Canonical names by identity."""
        return {id(parameter): self._name(name) for name, parameter in self.subject.named_parameters()}

    def describe(self) -> Any:
        shapes = [
            [self._name(name), list(tensor.shape), str(tensor.dtype)]
            for name, tensor in (*self.subject.named_parameters(), *self.subject.named_buffers())
        ]
        return ["module", shapes]


def _is_metric(module: torch.nn.Module) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" == "torchmetrics.metric.Metric" for kind in type(module).__mro__)


class _Stateful:
    """Anything with state_dict and load_state_dict."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    def state(self) -> Any:
        return self.subject.state_dict()

    def load(self, tree: Any) -> None:
        self.subject.load_state_dict(tree)

    def describe(self) -> Any:
        return ["stateful", f"{type(self.subject).__module__}.{type(self.subject).__qualname__}"]


class _Optimizer(_Stateful):
    """An optimizer whose state comes back exactly as it was.

    torch casts state to the parameter's dtype when it loads it, which would round fp32 moments of bf16 parameters; and what was
    read is contiguous, while kernels expect the parameter's own memory format.
    """

    def load(self, tree: Any) -> None:
        self.subject.load_state_dict(tree)
        here = [parameter for group in self.subject.param_groups for parameter in group["params"]]
        saved = [number for group in tree["param_groups"] for number in group["params"]]
        for number, parameter in zip(saved, here, strict=True):
            state = self.subject.state.get(parameter, {})
            for key, value in tree["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and isinstance(state.get(key), torch.Tensor):
                    state[key] = _as_it_was(state[key], value, parameter)


def _as_it_was(loaded: torch.Tensor, saved: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if loaded.dtype != saved.dtype:
        loaded = saved.to(parameter.device)
    if loaded.shape == parameter.shape and loaded.stride() != parameter.stride():
        loaded = torch.empty_like(parameter, dtype=loaded.dtype, device=loaded.device).copy_(loaded)
    return loaded


class _Loader(_Stateful):
    """A loader with a state of its own. One that run.batches() drives is restored by it; any other is restored here."""

    def __init__(self, subject: Any) -> None:
        super().__init__(subject)
        self.is_driven = False

    def state(self) -> Any:
        return {_DRIVEN: True} if self.is_driven else self.subject.state_dict()

    def load(self, tree: Any) -> None:
        if tree != {_DRIVEN: True}:
            self.subject.load_state_dict(tree)


class _Array:
    """A tensor or numpy array, restored in place."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    def state(self) -> Any:
        return self.subject

    def load(self, tree: Any) -> None:
        if isinstance(self.subject, torch.Tensor):
            with torch.no_grad():
                self.subject.copy_(tree)
        else:
            np.copyto(self.subject, tree)

    def describe(self) -> Any:
        return ["array", list(self.subject.shape), str(self.subject.dtype)]


class _Container:
    """A dict or list of plain state, restored in place so that the user's own references see it: those to the container, to
    containers in it, and to arrays in it (which stay on their device)."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    def state(self) -> Any:
        return self.subject

    def load(self, tree: Any) -> None:
        _merge(self.subject, tree)

    def describe(self) -> Any:
        return ["container", type(self.subject).__qualname__]


def _merge(here: Any, saved: Any) -> Any:
    """`saved`, in the objects of `here` wherever they fit."""
    if isinstance(here, torch.Tensor) and isinstance(saved, torch.Tensor):
        if (here.shape, here.dtype) != (saved.shape, saved.dtype):
            return saved.to(here.device)
        with torch.no_grad():
            return here.copy_(saved)
    if isinstance(here, np.ndarray) and isinstance(saved, np.ndarray):
        if (here.shape, here.dtype) != (saved.shape, saved.dtype) or not here.flags.writeable:
            return saved
        np.copyto(here, saved)
        return here
    if isinstance(here, MutableMapping) and type(here) is type(saved):
        merged = {key: _merge(here.get(key), value) for key, value in saved.items()}
        here.clear()
        here.update(merged)
        return here
    if type(here) is list and type(saved) is list:
        here[:] = [_merge(here[index] if index < len(here) else None, value) for index, value in enumerate(saved)]
        return here
    return saved


class _Generator:
    """A random generator that the user made: python's, numpy's (both kinds) or torch's."""

    def __init__(self, subject: _Random) -> None:
        self.subject = subject

    def state(self) -> Any:
        if isinstance(self.subject, torch.Generator):
            return self.subject.get_state()
        if isinstance(self.subject, random.Random):
            return self.subject.getstate()
        if isinstance(self.subject, np.random.RandomState):
            return self.subject.get_state(legacy=False)
        return dict(self.subject.bit_generator.state)

    def load(self, tree: Any) -> None:
        if isinstance(self.subject, torch.Generator):
            self.subject.set_state(tree)
        elif isinstance(self.subject, random.Random):
            self.subject.setstate(tree)
        elif isinstance(self.subject, np.random.RandomState):
            self.subject.set_state(tree)
        else:
            self.subject.bit_generator.state = tree

    def describe(self) -> Any:
        return ["generator", type(self.subject).__qualname__]


def _wrap(name: str, subject: Any) -> Tracked:
    if is_accelerator(subject):
        return AcceleratorState(subject)
    subject = unwrap(subject)
    if isinstance(subject, type):
        raise UsageError(f"track({name}=…): {subject.__qualname__} is a class; track the object that you made of it")
    if isinstance(subject, torch.nn.Module):
        return _Module(subject)
    if isinstance(subject, _Random):
        return _Generator(subject)
    if callable(getattr(subject, "state_dict", None)) and callable(getattr(subject, "load_state_dict", None)):
        if isinstance(subject, torch.utils.data.DataLoader):
            return _Loader(subject)
        return _Optimizer(subject) if isinstance(subject, torch.optim.Optimizer) else _Stateful(subject)
    if isinstance(subject, torch.Tensor) or type(subject) is np.ndarray:
        if isinstance(subject, np.ndarray) and not subject.flags.writeable:
            raise UsageError(f"track({name}=…): the array is read-only, so it cannot be restored; track a copy")
        return _Array(subject)
    if type(subject) in (dict, list, OrderedDict, Counter):
        return _Container(subject)
    raise UsageError(
        f"track({name}=…): an object of type {type(subject).__qualname__} cannot be tracked; {_advice(subject)}"
    )


def _advice(subject: Any) -> str:
    if isinstance(subject, int | float | str | bytes | tuple | None):
        return "wrap it in a dict (counters = {'best': 0.0}; run.track(counters=counters)) so that it can be restored in place"
    if isinstance(subject, torch.utils.data.DataLoader):
        return "there is no need to: run.batches(loader) keeps its position"
    return "give it state_dict() and load_state_dict(), or track the arrays and dicts in it"


class Tracker:
    """The tracked objects by name, in the order of tracking."""

    def __init__(self) -> None:
        self._tracked: dict[str, Tracked] = {}

    def __iter__(self) -> Iterator[tuple[str, Tracked]]:
        return iter(self._tracked.items())

    def __len__(self) -> int:
        return len(self._tracked)

    def names(self) -> list[str]:
        return list(self._tracked)

    def add(self, objects: Mapping[str, Any]) -> None:
        """Raises UsageError for a name that is taken, or an object that cannot be tracked."""
        for name, subject in objects.items():
            if name in self._tracked:
                raise UsageError(f"track({name}=…): something else is already tracked under this name")
            if not name.isidentifier() or len(name) > _NAME_LIMIT:
                raise UsageError(f"track: {name!r} is not a plain name")
            wrapped = _wrap(name, subject)
            for other, known in self._tracked.items():
                if known.subject is wrapped.subject:
                    raise UsageError(f"track({name}=…): this object is already tracked as {other!r}")
            self._tracked[name] = wrapped

    def complete(self) -> None:
        """An Accelerator stands for what it has prepared and what was registered with it, as far as that is not tracked yet."""
        for name, tracked in list(self):
            if isinstance(tracked, AcceleratorState):
                for part, subject in tracked.parts(name):
                    inner = unwrap(subject)
                    if not any(known.subject is inner for _, known in self):
                        self.add({part: subject})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: t.subject for name, t in self if isinstance(t.subject, torch.optim.Optimizer)}

    def modules(self) -> dict[str, torch.nn.Module]:
        return {name: t.subject for name, t in self if isinstance(t.subject, torch.nn.Module)}

    @property
    def is_sharded(self) -> bool:
        """Whether any parameter is a tensor of which this rank holds a part."""
        if not can_be_sharded():
            return False
        groups = (group for optimizer in self.optimizers().values() for group in optimizer.param_groups)
        one_of_each = {type(parameter): parameter for group in groups for parameter in group["params"]}
        for module in self.modules().values():
            one_of_each |= {type(parameter): parameter for parameter in module.parameters()}
        return any(is_sharded(parameter) for parameter in one_of_each.values())

    def parameters(self) -> dict[str, list[list[Any]]]:
        """By optimizer, its parameters in order, which it knows by number only: [group, name in a tracked module or "", shape]."""
        names: dict[int, str] = {}
        for name, tracked in self:
            if isinstance(tracked, _Module):
                names = {key: f"{name}.{label}" for key, label in tracked.parameters().items()} | names
        return {
            name: [
                [number, names.get(id(parameter), ""), list(parameter.shape)]
                for number, group in enumerate(optimizer.param_groups)
                for parameter in group["params"]
            ]
            for name, optimizer in self.optimizers().items()
        }

    def driven(self, loader: Any) -> None:
        """`run.batches` drives this loader, and knows where it is."""
        for _, tracked in self:
            if isinstance(tracked, _Loader) and tracked.subject is loader:
                tracked.is_driven = True

    def state(self) -> dict[str, Any]:
        return {name: tracked.state() for name, tracked in self}

    def check(self) -> None:
        """Raises UnsupportedState for what could not be saved: now, and not when the first save is due in an hour."""
        self.complete()
        # A loader makes an iterator when it is asked for its state.
        lay_out(flatten({name: tracked.state() for name, tracked in self if not isinstance(tracked, _Loader)}))

    def describe(self) -> dict[str, Any]:
        """For the run's identity: names, kinds, and the shapes of modules."""
        return {name: tracked.describe() for name, tracked in sorted(self._tracked.items())}
