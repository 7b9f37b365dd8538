"""What a user tracks, seen as state trees with canonical names.

Anything with `state_dict` / `load_state_dict` is tracked through these; arrays, dicts, lists and random generators are tracked
directly. Wrappers are looked through, so that a checkpoint does not depend on them: DDP's `module.`, `torch.compile`'s `_orig_mod.`,
Accelerate's optimizer and scheduler. Tracking registers only; nothing is read or written before `restore`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import numpy as np
import torch

from holdfast.core.errors import UsageError

__all__ = ["Tracked", "Tracker", "unwrap"]

_NAME_LIMIT = 100
_COMPILED = "_orig_mod"


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
        elif isinstance(subject, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            subject = subject.module
        elif type(subject).__module__.startswith("accelerate.") and hasattr(subject, "optimizer"):
            subject = subject.scheduler if hasattr(subject, "scheduler") else subject.optimizer
        else:
            return subject


def _canonical(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != _COMPILED)


class _Module:
    """A torch module; submodules may be compiled on their own, so keys are made canonical and mapped back at load."""

    def __init__(self, subject: torch.nn.Module) -> None:
        self.subject = subject

    def state(self) -> dict[str, Any]:
        return {_canonical(key): value for key, value in self.subject.state_dict().items()}

    def load(self, tree: Any) -> None:
        own = {_canonical(key): key for key in self.subject.state_dict()}
        self.subject.load_state_dict({own.get(key, key): value for key, value in tree.items()}, strict=False)

    def describe(self) -> Any:
        shapes = [
            [_canonical(name), list(tensor.shape), str(tensor.dtype)]
            for name, tensor in (*self.subject.named_parameters(), *self.subject.named_buffers())
        ]
        return ["module", shapes]


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
    """A dict or list of plain state, restored in place so that the user's own reference sees it."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    def state(self) -> Any:
        return self.subject

    def load(self, tree: Any) -> None:
        if isinstance(self.subject, MutableMapping):
            self.subject.clear()
            self.subject.update(tree)
        else:
            self.subject[:] = tree

    def describe(self) -> Any:
        return ["container", type(self.subject).__qualname__]


class _Generator:
    """A random generator that the user made: `random.Random`, `numpy.random.Generator` or `torch.Generator`."""

    def __init__(self, subject: random.Random | np.random.Generator | torch.Generator) -> None:
        self.subject = subject

    def state(self) -> Any:
        if isinstance(self.subject, torch.Generator):
            return self.subject.get_state()
        if isinstance(self.subject, random.Random):
            return self.subject.getstate()
        return dict(self.subject.bit_generator.state)

    def load(self, tree: Any) -> None:
        if isinstance(self.subject, torch.Generator):
            self.subject.set_state(tree)
        elif isinstance(self.subject, random.Random):
            self.subject.setstate(tree)
        else:
            self.subject.bit_generator.state = tree

    def describe(self) -> Any:
        return ["generator", type(self.subject).__qualname__]


def _wrap(name: str, subject: Any) -> Tracked:
    subject = unwrap(subject)
    if isinstance(subject, torch.nn.Module):
        return _Module(subject)
    if isinstance(subject, random.Random | np.random.Generator | torch.Generator):
        return _Generator(subject)
    if callable(getattr(subject, "state_dict", None)) and callable(getattr(subject, "load_state_dict", None)):
        return _Stateful(subject)
    if isinstance(subject, torch.Tensor | np.ndarray):
        return _Array(subject)
    if type(subject) in (dict, list):
        return _Container(subject)
    advice = (
        "wrap it in a dict (counters = {'best': 0.0}; run.track(counters=counters)) so that it can be restored in place"
        if isinstance(subject, int | float | str | bytes | tuple | None)
        else "give it state_dict() and load_state_dict(), or track the arrays and dicts in it"
    )
    raise UsageError(f"track({name}=…): an object of type {type(subject).__qualname__} cannot be tracked; {advice}")


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

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: t.subject for name, t in self if isinstance(t.subject, torch.optim.Optimizer)}

    def modules(self) -> dict[str, torch.nn.Module]:
        return {name: t.subject for name, t in self if isinstance(t.subject, torch.nn.Module)}

    def state(self) -> dict[str, Any]:
        return {name: tracked.state() for name, tracked in self}

    def describe(self) -> dict[str, Any]:
        """For the run's identity: names, kinds, and the shapes of modules."""
        return {name: tracked.describe() for name, tracked in sorted(self._tracked.items())}
