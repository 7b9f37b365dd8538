"""Attributes of one object that are others for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]


@contextmanager
def replaced(owner: Any, **parts: Any) -> Iterator[None]:
    """Until the block is left; on the object itself, and nowhere else."""
    before = {name: vars(owner)[name] for name in parts if name in vars(owner)}
    for name, part in parts.items():
        setattr(owner, name, part)
    try:
        yield
    finally:
        for name in parts:
            if name in before:
                setattr(owner, name, before[name])
            else:
                vars(owner).pop(name, None)
