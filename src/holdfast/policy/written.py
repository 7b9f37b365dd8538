"""States as text: what a controller writes down, so that one that is killed goes on where it was.

A state is a frozen dataclass; its text is JSON with a format number in front. What is read is checked field by field against the
types of the dataclass, so a torn or foreign text is an error here and not a strange decision later.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from holdfast.core.errors import FormatError, UsageError

__all__ = ["read_state", "write_state"]

_State = TypeVar("_State")
_FORMAT = 1


def write_state(state: Any) -> str:
    """`state` is a dataclass."""
    values = {each.name: getattr(state, each.name) for each in fields(state)}
    return msgspec.json.encode({"format": _FORMAT, **values}).decode()


def read_state(what: str, text: str, kind: type[_State]) -> _State:
    """The state that was written. FormatError says why the text is no such state; `what` is used in messages."""
    try:
        tree = msgspec.json.decode(text)
        format_ = tree.pop("format") if isinstance(tree, dict) else None
        names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
        if format_ == _FORMAT and set(tree) == names:
            return msgspec.convert(tree, kind)
    except (msgspec.MsgspecError, UsageError, UnicodeError, KeyError, RecursionError) as error:
        raise FormatError(f"this is not {what}: {error}") from None
    if isinstance(format_, int) and format_ > _FORMAT:
        raise FormatError(f"{what} of format {format_}: a newer holdfast has written it")
    raise FormatError(f"this is not {what}: the fields {', '.join(sorted(names))} are expected")
