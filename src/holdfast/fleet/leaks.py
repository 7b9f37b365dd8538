"""What a fleet has left behind, by the provider's own tags: found without any record of ours, and ended.

    places (regions, projects, a rehearsal cloud) → machines and leftovers of the fleet → past their expiry? → end, remove

Everything that is launched carries the moment after which nobody can still want it, and each renewed grant moves that. What has no
such moment, or one that cannot be read, is shown and never ended: nobody knows that it is not wanted. A place that does not answer,
and a thing that does not go, hold up nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from holdfast.core.errors import HoldfastError
from holdfast.provider.base import Instances, Leftover, Machine

__all__ = ["MARGIN_S", "Leak", "Sighting", "end", "look"]

MARGIN_S = 600
"""Clocks differ, and renewals are under way."""


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing that is past its time, or that nobody knows the time of."""

    place: str
    thing: Machine | Leftover
    expired_s: int | None
    """So long ago; None: it does not say."""

    @property
    def is_machine(self) -> bool:
        return isinstance(self.thing, Machine)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.place, "machine" if isinstance(self.thing, Machine) else self.thing.kind, self.thing.id

    @property
    def ends(self) -> bool:
        """Whether it is to be ended: what is ending already goes by itself."""
        return self.expired_s is not None and not (isinstance(self.thing, Machine) and self.thing.state == "ending")


@dataclass(frozen=True, slots=True)
class Sighting:
    leaks: tuple[Leak, ...] = ()
    problems: tuple[str, ...] = field(default=())
    """Places that did not answer: what is there is not known."""

    @property
    def to_end(self) -> tuple[Leak, ...]:
        return tuple(each for each in self.leaks if each.ends)

    def still(self, newer: Sighting) -> tuple[Leak, ...]:
        """What was to be ended, and is still past its time. It may have been renewed while somebody was asked."""
        shown = {each.key for each in self.to_end}
        return tuple(each for each in newer.to_end if each.key in shown)


def look(places: Mapping[str, Instances], fleet: str, regions: Collection[str] = ()) -> Sighting:
    """`regions`: none is all."""
    leaks: list[Leak] = []
    problems: list[str] = []
    for place, cloud in places.items():
        now_s = int(cloud.clock.unix_s())
        for ask in (lambda cloud=cloud: _machines(cloud, fleet), lambda cloud=cloud: cloud.leftovers(fleet)):
            try:
                found: Iterable[Machine | Leftover] = ask()
            except HoldfastError as error:
                problems.append(f"{place}: {error}")
                continue
            leaks += [each for thing in found for each in _leak(place, thing, now_s, regions)]
    return Sighting(tuple(sorted(leaks, key=lambda each: (not each.is_machine, each.key))), tuple(problems))


def _machines(cloud: Instances, fleet: str) -> list[Machine]:
    return [each for each in cloud.machines(fleet) if each.state != "gone"]


def _leak(place: str, thing: Machine | Leftover, now_s: int, regions: Collection[str]) -> Iterable[Leak]:
    region = thing.pool.region if isinstance(thing, Machine) else thing.region
    if regions and region not in regions:
        return
    if thing.expires_unix_s <= 0:
        yield Leak(place, thing, None)
    elif thing.expires_unix_s + MARGIN_S < now_s:
        yield Leak(place, thing, now_s - thing.expires_unix_s)


def end(places: Mapping[str, Instances], leaks: Iterable[Leak]) -> list[str]:
    """End and remove these, place by place, machines first. Returns what did not go, for people."""
    problems: list[str] = []
    by_place: dict[str, list[Leak]] = {}
    for each in leaks:
        by_place.setdefault(each.place, []).append(each)
    for place, several in by_place.items():
        machines = [each.thing for each in several if isinstance(each.thing, Machine)]
        leftovers = [each.thing for each in several if isinstance(each.thing, Leftover)]
        for act in (
            lambda place=place, machines=machines: places[place].terminate(machines),
            lambda place=place, leftovers=leftovers: places[place].remove(leftovers),
        ):
            try:
                act()  # type: ignore[no-untyped-call]
            except HoldfastError as error:
                problems.append(f"{place}: {error}")
    return problems
