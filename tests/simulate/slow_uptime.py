"""Machines again, slowly: one after the other, event by event, in fractions of seconds, with the rules written down anew.

Nothing of the simulator and no policy is used here; plain facts come in and go out. `simulate.uptime.engine` is checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import NormalDist

Ask = Callable[["Known"], Fraction]


@dataclass(frozen=True)
class World:
    """What holds for all machines; seconds."""

    start: Fraction
    restore: Fraction
    stall: Fraction
    commit: Fraction
    last_save_mean: Fraction
    last_save_sd: float
    confidence: float
    least: float

    def planned(self, share: float) -> Fraction:
        """What a last save takes at most with that probability, to the millisecond."""
        if not self.last_save_sd:
            return self.last_save_mean
        sigma = math.sqrt(math.log(1 + self.last_save_sd**2))
        median = float(self.last_save_mean) / math.sqrt(1 + self.last_save_sd**2)
        return Fraction(round(1000 * median * math.exp(sigma * NormalDist().inv_cdf(share))), 1000)


@dataclass(frozen=True)
class Machine:
    life: Fraction
    notice: Fraction | None
    last_save: Fraction


@dataclass(frozen=True)
class Known:
    age: Fraction
    saves: int
    saves_before: int
    preemptions: int
    exposure: Fraction
    at_work: Fraction
    noticed: int
    said: Fraction | None


@dataclass
class Diary:
    """Seconds by bucket, and what else came of one machine."""

    useful: Fraction = Fraction(0)
    checkpoint_save: Fraction = Fraction(0)
    initialisation: Fraction = Fraction(0)
    restore: Fraction = Fraction(0)
    infrastructure_recovery: Fraction = Fraction(0)
    lost_work: Fraction = Fraction(0)
    idle: Fraction = Fraction(0)
    saves: int = 0
    noticed: bool = False
    shelf: list[tuple[Fraction, Fraction]] = field(default_factory=list)
    """Saves: the work that each holds, and when it is durable."""

    def end(self, world: Machine, work: Fraction) -> None:
        self.useful = max((held for held, durable in self.shelf if durable <= world.life), default=Fraction(0))
        self.lost_work = work - self.useful


def run(world: World, machines: Sequence[Machine], ask: Ask) -> list[Diary]:
    diaries: list[Diary] = []
    before = preemptions = noticed = 0
    exposure = Fraction(0)
    for number, machine in enumerate(machines):

        def asked(age: Fraction, saves: int, at_work: Fraction, said: Fraction | None) -> Fraction:
            return ask(Known(age, saves, before, preemptions, exposure, at_work, noticed, said))  # noqa: B023

        diary = _one(world, machine, asked, is_first=number == 0)
        diaries.append(diary)
        if machine.life > world.start + world.restore:
            preemptions += 1
            exposure += machine.life - world.start - world.restore
        before += diary.saves
        noticed += diary.noticed
    return diaries


def _one(world: World, machine: Machine, asked: Callable[..., Fraction], *, is_first: bool) -> Diary:
    diary = Diary()
    started = min(machine.life, world.start)
    if is_first:
        diary.initialisation = started
    else:
        diary.infrastructure_recovery = started
    diary.restore = min(machine.life - started, world.restore)
    ready = world.start + world.restore
    if machine.life <= ready:
        return diary
    now, work = ready, Fraction(0)
    said = None
    while True:
        said = asked(now, diary.saves, now - ready, said)
        due = now + said
        if diary.shelf:
            due = max(due, diary.shelf[-1][1])
        if machine.notice is not None:
            heard = max(now, machine.life - machine.notice)
            if heard <= due:
                _noticed(world, machine, diary, heard, work + heard - now)
                return diary
        if machine.life <= due:
            diary.end(machine, work + machine.life - now)
            return diary
        work += due - now
        diary.saves += 1
        if machine.life < due + world.stall:
            diary.checkpoint_save += machine.life - due
            diary.end(machine, work)
            return diary
        diary.checkpoint_save += world.stall
        now = due + world.stall
        diary.shelf.append((work, now + world.commit))


def _noticed(world: World, machine: Machine, diary: Diary, now: Fraction, work: Fraction) -> None:
    assert machine.notice is not None
    lead = min(machine.notice, machine.life)
    kept = Fraction(round(1000 * 4 * min(Fraction(1), lead / 20)), 1000)
    begun, flies_until = diary.shelf[-1] if diary.shelf else (Fraction(0), Fraction(0))
    flies = max(Fraction(0), flies_until - now)
    planned = world.planned((1 + world.confidence) / 2)
    usable = machine.life - kept - now
    saves_last = False
    if flies + planned <= usable:
        latest = machine.life - kept - planned
        in_passing = max(world.stall + world.commit, planned)
        unsaved = work - begun
        if not flies and unsaved > 0 and unsaved >= planned and now + in_passing <= latest:
            diary.checkpoint_save += world.stall
            now += world.stall
            diary.shelf.append((work, now + world.commit))
            begun = work
        work += latest - now
        now = latest
        saves_last = work > begun
    elif not flies:
        saves_last = work > begun and usable >= world.planned(world.least)
    if saves_last:
        ends = now + machine.last_save
        diary.shelf.append((work, ends))
    else:
        ends = max(now, flies_until)
    ends = min(ends, machine.life)
    diary.checkpoint_save += ends - now
    diary.idle = machine.life - ends
    diary.end(machine, work)
    diary.noticed = diary.lost_work == 0
