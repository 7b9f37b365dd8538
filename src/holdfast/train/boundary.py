"""Is this the end of a step? Only there may the state be copied.

A step boundary is the end of a loop iteration in which every tracked optimizer that was due has stepped and no gradient is pending.
Hooks on the optimizers say which of them stepped. One that did not, and has gradients, is in the middle of an accumulation that a
checkpoint would lose: the save is deferred until it has stepped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch

__all__ = ["StepGate"]

_COMPILE_REASON = (
    "holdfast watches the steps of tracked optimizers, which fullgraph=True does not allow: "
    "compile optimizer.step without it"
)
_STALE_AFTER_ITERATIONS = 100
"""Gradients that nothing has touched for this many iterations are left over from a phase of training that has ended."""


class _Watch:
    """What is known of one optimizer since the iteration began."""

    def __init__(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self.name = name
        self.optimizer = optimizer
        self.stepped = False
        self._signature: list[tuple[int, int]] = []
        self._unchanged_since = 0

    def is_accumulating(self, iteration: int) -> bool:
        """Whether gradients wait for this optimizer's step. Looks at them only when a save is due."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not any(bool(gradient.any()) for gradient in gradients):
            return False
        signature = [(id(gradient), gradient._version) for gradient in gradients]
        if signature != self._signature:
            self._signature, self._unchanged_since = signature, iteration
        return iteration - self._unchanged_since < _STALE_AFTER_ITERATIONS


def _with_inner(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """An optimizer may step through another one that it holds (SAM, Lookahead) and never be stepped itself."""
    found = [optimizer]
    for holder in found:
        for value in vars(holder).values():
            if isinstance(value, torch.optim.Optimizer) and not any(value is known for known in found):
                found.append(value)
    return found


def _not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """A compiled step breaks its graph here, and one that must not (fullgraph) is refused with these words."""
    if "reason" in inspect.signature(torch.compiler.disable).parameters:
        return cast("Callable[..., None]", torch.compiler.disable(hook, reason=_COMPILE_REASON))
    return cast("Callable[..., None]", torch.compiler.disable(hook))


class StepGate:
    """Watches every tracked optimizer, and tells the snapshot when one is about to write.

    torch calls the hooks for plain, fused, foreach and compiled steps, under LR schedulers and under GradScaler; a step that
    GradScaler skips counts as due and done, because its gradients are dropped.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer], before_write: Callable[[], None]) -> None:
        self._watches = [_Watch(name, optimizer) for name, optimizer in optimizers.items()]
        self._before_write = before_write
        self._iteration = 0
        self._handles: list[Any] = []
        for watch in self._watches:
            after_step = self._post_hook(watch)
            for optimizer in _with_inner(watch.optimizer):
                self._handles.append(optimizer.register_step_pre_hook(self._pre_hook()))
                self._handles.append(optimizer.register_step_post_hook(after_step))

    def _pre_hook(self) -> Callable[..., None]:
        @_not_compiled
        def before_step(*_: object) -> None:
            self._before_write()

        return before_step

    def _post_hook(self, watch: _Watch) -> Callable[..., None]:
        @_not_compiled
        def after_step(*_: object) -> None:
            watch.stepped = True

        return after_step

    @property
    def any_stepped(self) -> bool:
        """Whether an optimizer stepped in this iteration; true where none is tracked, since then nothing can be told."""
        return not self._watches or any(watch.stepped for watch in self._watches)

    def accumulating(self) -> str | None:
        """The name of an optimizer in the middle of an accumulation, or None: this is a step boundary."""
        for watch in self._watches:
            if not watch.stepped and watch.is_accumulating(self._iteration):
                return watch.name
        return None

    def begin_iteration(self) -> None:
        """Before the loop gets a batch. What stepped stays known until then: the end of an epoch is also a boundary."""
        self._iteration += 1
        for watch in self._watches:
            watch.stepped = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
