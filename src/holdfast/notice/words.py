"""Notices on their way between processes: to the words of `core.contract`, and back."""

from __future__ import annotations

from typing import Any

from holdfast.core.contract import NoticeWord
from holdfast.notice.base import Notice, NoticeKind

__all__ = ["as_notice", "as_word"]


def as_word(notice: Notice) -> NoticeWord:
    return NoticeWord(
        kind=notice.kind.value, deadline_unix_s=notice.deadline_unix_s, source=notice.source, id=notice.id,
        heard_unix_s=notice.heard_unix_s, assumed=notice.assumed, evidence=notice.evidence,
    )  # fmt: skip


def as_notice(word: NoticeWord) -> Notice:
    """A kind that only a newer sender knows is taken by its deadline."""
    fields: dict[str, Any] = {name: getattr(word, name) for name in word.__struct_fields__ if name != "kind"}
    try:
        kind = NoticeKind(word.kind)
    except ValueError:
        kind = NoticeKind.REBALANCE if word.deadline_unix_s is None else NoticeKind.TERMINATION
    return Notice(kind=kind, **fields)
