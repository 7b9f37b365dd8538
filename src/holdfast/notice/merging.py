"""From what watchers say to what the consumer is told: a pure state machine, events in, notices and records out.

Sightings (one source's word about one event) are gathered into incidents: sightings of different sources with deadlines close to
each other are the same event. The consumer is told about incidents: when one opens, when its deadline (the earliest credible one of
its sightings) or its kind changes, and when the last of its sources has withdrawn it or it is long past. Everything that changes is
recorded, also what the consumer need not know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.core.events import Event
from holdfast.notice.base import Notice, NoticeKind

__all__ = ["EXPIRED_S", "SAME_EVENT_S", "SLIDE_S", "Heard", "Merging", "Recovered", "Said", "Tick", "Told", "Troubled"]

SLIDE_S = 2.0
"""Deadlines that move by less are the resolution of a date or a late poll."""
SAME_EVENT_S = 300.0
"""Two sources that say the end is this close together speak of the same end: a cloud's notice, the scaling group's reaction to it,
and the SIGTERM of the node's shutdown are within minutes."""
EXPIRED_S = 300.0
"""So long after its deadline a machine that still runs has not been taken: the notice is over."""
ASSUMED_LEAD_S = 30.0
"""What is assumed where an end is announced without any credible time."""

_RANK = {
    NoticeKind.PREEMPTION: 0,
    NoticeKind.TERMINATION: 1,
    NoticeKind.MAINTENANCE: 2,
    NoticeKind.REBALANCE: 3,
}
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Heard:
    """A watcher has yielded a notice."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class Troubled:
    """A source did not answer, not sensibly, or its watcher failed."""

    source: str
    what: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """A source has answered sensibly."""

    source: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Said = Heard | Troubled | Recovered | Tick


@dataclass(frozen=True, slots=True)
class Told:
    """What follows: notices for the consumer, events for the record, in order."""

    notices: tuple[Notice, ...] = ()
    events: tuple[Event, ...] = ()


@dataclass(slots=True)
class _Incident:
    id: str
    sightings: dict[_Key, Notice] = field(default_factory=dict)
    told: Notice | None = None

    def deadline_unix_s(self) -> float | None:
        return self._headline().deadline_unix_s

    def last_unix_s(self) -> float:
        """The latest deadline of any source; infinite for advice."""
        return max(math.inf if n.deadline_unix_s is None else n.deadline_unix_s for n in self.sightings.values())

    def _headline(self) -> Notice:
        """The sighting with the earliest deadline."""
        sightings = self.sightings.values()
        return min(sightings, key=lambda n: math.inf if n.deadline_unix_s is None else n.deadline_unix_s)

    def notice(self) -> Notice:
        headline = self._headline()
        kind = min((n.kind for n in self.sightings.values()), key=_RANK.__getitem__)
        sources = sorted({n.source for n in self.sightings.values()})
        return replace(headline, kind=kind, id=self.id, evidence={**headline.evidence, "sources": sources})


class Merging:
    """The state. `take` is all of it; it never raises for anything that a source can say.

    Thread safety: none; one thread takes. `sightings` and `open` may be read by that thread.
    """

    def __init__(self) -> None:
        self._incidents: dict[str, _Incident] = {}
        self._incident_of: dict[_Key, _Incident] = {}
        self._over: dict[_Key, float] = {}
        """Sightings whose deadline has long passed, as long as their source repeats that deadline."""
        self._failures: dict[str, int] = {}
        self._opened = 0
        self._notices: list[Notice] = []
        self._events: list[Event] = []

    def take(self, said: Said, now_unix_s: float) -> Told:
        """Everything that follows from `said`."""
        match said:
            case Heard(notice):
                self._hear(notice, now_unix_s)
            case Troubled(source, what):
                self._trouble(source, what, now_unix_s)
            case Recovered(source):
                self._recover(source, now_unix_s)
            case Tick():
                self._expire(now_unix_s)
        told = Told(tuple(self._notices), tuple(self._events))
        self._notices, self._events = [], []
        return told

    def open(self) -> list[Notice]:
        """Everything that stands, the most urgent first, as it was told last."""
        told = [incident.told for incident in self._incidents.values() if incident.told is not None]
        return sorted(told, key=lambda n: math.inf if n.deadline_unix_s is None else n.deadline_unix_s)

    def sightings(self, incident_id: str) -> list[Notice]:
        """What the sources said about an incident, as they said it; empty when it is over."""
        incident = self._incidents.get(incident_id)
        return list(incident.sightings.values()) if incident else []

    def _hear(self, notice: Notice, now_unix_s: float) -> None:
        key = (notice.source, notice.id)
        if notice.kind == NoticeKind.WITHDRAWN:
            self._over.pop(key, None)
            if key in self._incident_of:
                self._withdraw(key, "withdrawn", now_unix_s)
            return
        notice = _credible(notice)
        if key not in self._incident_of and self._is_over(key, notice, now_unix_s):
            return
        incident = self._incident_of.get(key)
        if incident is not None:
            incident.sightings[key] = notice
        else:
            incident = self._place(key, notice, now_unix_s)
        self._revise(incident, now_unix_s)

    def _is_over(self, key: _Key, notice: Notice, now_unix_s: float) -> bool:
        deadline = notice.deadline_unix_s
        if deadline is None or deadline >= now_unix_s - EXPIRED_S:
            self._over.pop(key, None)
            return False
        if key not in self._over:
            self._record(
                "notice.trouble", now_unix_s, source=notice.source, times=1, evidence=notice.evidence,
                what=f"its deadline passed {now_unix_s - deadline:.0f} s ago and the machine still runs: ignored",
            )  # fmt: skip
        self._over[key] = deadline
        return True

    def _place(self, key: _Key, notice: Notice, now_unix_s: float) -> _Incident:
        incident = self._same_event(notice)
        joined = incident is not None
        if incident is None:
            self._opened += 1
            incident = _Incident(f"{notice.source}/{notice.id}#{self._opened}")
            self._incidents[incident.id] = incident
        incident.sightings[key] = notice
        self._incident_of[key] = incident
        self._record(
            "notice.heard", now_unix_s, kind=notice.kind.value, source=notice.source, id=notice.id, incident=incident.id,
            deadline_unix_s=notice.deadline_unix_s, assumed=notice.assumed, duplicate=joined, evidence=notice.evidence,
        )  # fmt: skip
        return incident

    def _same_event(self, notice: Notice) -> _Incident | None:
        """The incident of other sources whose deadline is nearest, if it is near. Events that one source tells apart are two."""
        if notice.deadline_unix_s is None:
            return None
        near: list[tuple[float, str]] = []
        for incident in self._incidents.values():
            deadline = incident.deadline_unix_s()
            if deadline is not None and all(source != notice.source for source, _ in incident.sightings):
                near.append((abs(deadline - notice.deadline_unix_s), incident.id))
        nearest = min(near, default=(math.inf, ""))
        return self._incidents[nearest[1]] if nearest[0] <= SAME_EVENT_S else None

    def _revise(self, incident: _Incident, now_unix_s: float) -> None:
        """Tell the consumer what it does not know yet about an incident that stands."""
        before, now = incident.told, incident.notice()
        if before is not None:
            moved = _moved(before.deadline_unix_s, now.deadline_unix_s)
            if not moved and before.kind == now.kind:
                return
            self._record(
                "notice.moved", now_unix_s, incident=incident.id, kind=now.kind.value, source=now.source,
                from_unix_s=before.deadline_unix_s, to_unix_s=now.deadline_unix_s, assumed=now.assumed,
            )  # fmt: skip
        incident.told = now
        self._notices.append(now)

    def _withdraw(self, key: _Key, reason: str, now_unix_s: float) -> None:
        incident = self._incident_of.pop(key)
        gone = incident.sightings.pop(key)
        still = sorted({source for source, _ in incident.sightings})
        self._record(
            "notice.withdrawn",
            now_unix_s,
            source=gone.source,
            id=gone.id,
            incident=incident.id,
            reason=reason,
            still=still,
        )
        if incident.sightings:
            self._revise(incident, now_unix_s)
            return
        del self._incidents[incident.id]
        told = incident.told or gone
        evidence = {"was": told.kind.value, "deadline_unix_s": told.deadline_unix_s, "reason": reason}
        self._notices.append(
            replace(
                told,
                kind=NoticeKind.WITHDRAWN,
                deadline_unix_s=None,
                assumed=False,
                heard_unix_s=now_unix_s,
                evidence=evidence,
            )
        )

    def _expire(self, now_unix_s: float) -> None:
        for incident in list(self._incidents.values()):
            if incident.last_unix_s() < now_unix_s - EXPIRED_S:
                for key, sighting in list(incident.sightings.items()):
                    self._over[key] = sighting.deadline_unix_s or now_unix_s
                    self._withdraw(key, "expired", now_unix_s)

    def _trouble(self, source: str, what: str, now_unix_s: float) -> None:
        times = self._failures.get(source, 0) + 1
        self._failures[source] = times
        # The 1st, 2nd, 4th, 8th…: days of silence are some lines, not a million.
        if times & (times - 1) == 0:
            self._record("notice.trouble", now_unix_s, source=source, what=what, times=times)

    def _recover(self, source: str, now_unix_s: float) -> None:
        times = self._failures.pop(source, 0)
        if times:
            self._record("notice.trouble", now_unix_s, source=source, what="is heard again", times=times)

    def _record(self, name: str, now_unix_s: float, **fields: Any) -> None:
        self._events.append(Event(name, now_unix_s, fields))


def _credible(notice: Notice) -> Notice:
    """The notice with a deadline that can be computed with: an end without one is assumed to be near."""
    deadline = notice.deadline_unix_s
    if deadline is not None and math.isfinite(deadline) and notice.kind != NoticeKind.REBALANCE:
        return notice
    if notice.kind in (NoticeKind.PREEMPTION, NoticeKind.TERMINATION):
        return replace(notice, deadline_unix_s=notice.heard_unix_s + ASSUMED_LEAD_S, assumed=True)
    return replace(notice, deadline_unix_s=None)


def _moved(before_unix_s: float | None, now_unix_s: float | None) -> bool:
    if before_unix_s is None or now_unix_s is None:
        return before_unix_s != now_unix_s
    return abs(before_unix_s - now_unix_s) >= SLIDE_S
