"""A request as a cloud sees it, and what every cloud is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import ClassVar, Protocol

from holdfast.testing.loopback import Answer
from holdfast.testing.metadata.timeline import Step

__all__ = ["Ask", "Cloud", "http_date", "text_answer"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `headers` are in lower case; a header that was sent twice is joined with ", ", as proxies do."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


class Cloud(Protocol):
    """The state behind one cloud's metadata service.

    Thread safety: none; the server calls one method at a time.
    """

    name: str
    verbs: ClassVar[dict[str, str]]
    """What `apply` can do, and what that means."""

    def environment(self, endpoint: str) -> dict[str, str]:
        """The variables that make clients find the service at `endpoint`."""
        ...

    def apply(self, step: Step, at_unix_s: float) -> None:
        """Let something happen."""
        ...

    def answer(self, ask: Ask, now_unix_s: float, waited_s: float) -> Answer | None:
        """The answer, or None: not yet. A request that waits is asked again, with the seconds that it has waited."""
        ...


def text_answer(status: int, text: str, *headers: tuple[str, str], type: str = "text/plain") -> Answer:
    return Answer(status, (("Content-Type", type), *headers), text.encode())


def http_date(unix_s: float) -> str:
    """Like `Mon, 19 Sep 2016 18:29:47 GMT`."""
    return formatdate(unix_s, usegmt=True)
