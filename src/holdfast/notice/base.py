"""What a notice is, and what every watcher promises.

A watcher speaks one provider's protocol and yields `Notice`s about one or several events; the stream merges watchers. The same
event is always yielded under the same `(source, id)`: again when its deadline has moved, and as `WITHDRAWN` when it is off.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from holdfast.core.clock import Clock

__all__ = ["Acknowledges", "Lookout", "Notice", "NoticeKind", "Watcher"]


class NoticeKind(StrEnum):
    """What is going to happen."""

    PREEMPTION = "preemption"
    """The provider takes the capacity back. Always has a deadline."""
    REBALANCE = "rebalance"
    """Advice: the risk of a preemption has risen. Save now, ask for a replacement, train on. Never has a deadline."""
    MAINTENANCE = "maintenance"
    """The host is worked on. With a deadline the process is lost then; without, the machine pauses and comes back."""
    TERMINATION = "termination"
    """A user, a scheduler or a scaling group ends the machine or the job. Always has a deadline."""
    WITHDRAWN = "withdrawn"
    """An event that was told before is off, or has passed without anything happening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing that was said about one event.

    From a watcher, `id` is the identity of the event at its source. From the stream, `id` names the event as the stream sees it,
    whichever sources report it, and is the same in everything that is told about it.
    """

    kind: NoticeKind
    deadline_unix_s: float | None
    """When the machine goes, by this machine's clock; None: advice."""
    source: str
    """Provider and channel, like `aws:spot`."""
    id: str
    heard_unix_s: float
    assumed: bool = False
    """True: the provider did not say when; the deadline is the least time that it usually gives."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """What the source said, as JSON values, without secrets."""

    def left_s(self, now_unix_s: float) -> float | None:
        """Seconds until the deadline, never below zero; None for advice."""
        return None if self.deadline_unix_s is None else max(0.0, self.deadline_unix_s - now_unix_s)


@dataclass(frozen=True, slots=True)
class Lookout:
    """What the stream lends a watcher. Used on the stream's event loop only."""

    clock: Clock
    sleep: Callable[[float], Awaitable[None]]
    trouble: Callable[[str, str], None]
    """`trouble(source, what)`: the source did not answer, or not sensibly. Call it each time; repetitions are thinned out."""
    well: Callable[[str], None]
    """`well(source)`: the source has answered sensibly. Call it each time."""


class Watcher(Protocol):
    """Hears about events at one provider.

    Thread safety: `watch` runs on the stream's event loop and never blocks it; one iteration at a time. `name` may be read from
    any thread.
    Ownership: the stream closes the iterator; connections that `watch` opened are closed by then. What has been heard is kept in
    the watcher, so that a second `watch` after a failure still notices what was withdrawn in between. Notices are immutable.
    Failure contract: what a provider can do (silence, garbage, refusals) is reported through `lookout.trouble` and tried again for
    ever. An exception means a flaw of the watcher: the stream records it and calls `watch` again after a pause. Ending the
    iteration means that nothing more will ever be heard.
    """

    @property
    def name(self) -> str:
        """For people and records: the provider, and what it is watched for."""
        ...

    def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        """Yield each event once when it is heard, again when it changes, and as WITHDRAWN when it is off."""
        ...


@runtime_checkable
class Acknowledges(Watcher, Protocol):
    """A watcher whose provider waits for a word that the machine is ready to go.

    Thread safety, ownership and failure contract are those of `Watcher`; `acknowledge` may run beside `watch`.
    """

    async def acknowledge(self, notice: Notice, lookout: Lookout) -> bool:
        """Tell the provider that `notice` (as this watcher yielded it) may begin. False: not told, for a reason that is reported
        through `lookout.trouble`."""
        ...
