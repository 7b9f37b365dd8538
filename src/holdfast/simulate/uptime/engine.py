"""Where the uptime of spot machines goes: saves, notices and lost work, in continuous time instead of ticks.

    lifetimes, notices (drawn or real) → Fates → play(rule, conditions, fates) → Uptimes: every millisecond in one bucket

A run works on one machine after the other. On each:

    start and restore | work, save, work, save, … | notice: perhaps an insurance, the last save | gone

A save stops the loop for `save_cost_s`, goes out in the background, and is durable `commit_s` after the loop goes on; the next
one begins when the rule's interval has passed since then, and not before it is durable. Whatever is not durable when the machine
goes is lost. After a notice only what stands in `last_save.py` is saved.

How often to save is the rule's business (`intervals.py`), and the only thing that differs between two plays of the same fates.
Times are whole milliseconds, so that nothing is rounded on the way and a slower program can be compared for equality. The buckets
are those of the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.ledger.goodput import Bucket
from holdfast.policy.market.arrays import Bools, Floats, Ints
from holdfast.simulate.uptime.fates import NEVER_MS, Conditions, Fates
from holdfast.simulate.uptime.last_save import Heard, Plan, after_notice

__all__ = ["BUCKETS", "IntervalRule", "Seen", "Uptimes", "ceiling_ms", "play"]

BUCKETS = (
    Bucket.USEFUL, Bucket.SAVE, Bucket.INITIALISATION, Bucket.RESTORE, Bucket.RECOVERY, Bucket.LOST, Bucket.IDLE,
)  # fmt: skip
"""Those that occur here. A last save counts as save, and what is left after it until the machine goes as idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a trainer knows when it decides how long to work until the next save, one array element per run."""

    conditions: Conditions
    age_s: Floats
    """Of the machine."""
    saves: Ints
    """Begun on this machine. With the first one their cost is measured."""
    saves_before: Ints
    """Begun on the machines before."""
    preemptions: Ints
    """Machines before this one on which work had begun: where it had not, nothing could be lost, however often it is saved."""
    exposure_s: Floats
    """From the beginning of work to the end, on the machines before."""
    at_work_s: Floats
    """The same of this machine, so far."""
    noticed: Ints
    """Preemptions with a notice after which nothing was lost."""
    interval_s: Floats
    """What the rule said last on this machine; nan before."""


class IntervalRule(Protocol):
    """How long to work until the next save."""

    @property
    def name(self) -> str: ...

    @property
    def learns(self) -> bool:
        """Whether it looks at what earlier machines have shown. If not, machines need not be played in their order."""
        ...

    def next_interval_s(self, seen: Seen) -> Floats:
        """Asked when work begins on a machine, and whenever the loop goes on after a save. Infinity: no more saves."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Uptimes:
    """Run by machine. The buckets add up to the uptime."""

    buckets: Mapping[Bucket, Ints]
    uptime_ms: Ints
    queue_wait_ms: Ints
    """Before each machine; not billed, and no part of the uptime."""
    saves: Ints
    """Begun because the interval had passed."""
    noticed: Bools
    """There was a notice, and everything was durable when the machine went."""

    @property
    def goodput(self) -> float:
        """Useful share of the uptime, over everything."""
        return float(self.buckets[Bucket.USEFUL].sum() / max(1, self.uptime_ms.sum()))


def play(rule: IntervalRule, conditions: Conditions, fates: Fates) -> Uptimes:
    """All runs side by side, and of a rule that does not learn all their machines."""
    runs, machines = fates.life_ms.shape
    # Machines that do not know of each other are runs of one machine each.
    story = _Story(conditions, fates, runs if rule.learns else runs * machines)
    loops = _begin(story)
    while len(loops.run):
        loops.interval_s = _asked(rule, story, loops)
        save_at_ms = np.maximum(loops.now_ms + _whole_ms(loops.interval_s), loops.arrives_ms)
        hears = loops.notice_ms <= save_at_ms
        dies = ~hears & (loops.gone_ms <= save_at_ms)
        _leave(story, loops, np.flatnonzero(hears))
        _die(story, loops, np.flatnonzero(dies))
        torn = _save(story, loops, save_at_ms, ~hears & ~dies)
        loops = _go_on(story, loops, hears | dies | torn)
    return _uptimes(story, conditions, fates)


def ceiling_ms(conditions: Conditions, fates: Fates) -> Ints:
    """Useful time, run by machine, of one who knows when each machine goes: one save, just before. No rule has more.

    With a notice the last save may be quicker than one that is made in passing.
    """
    save_ms = np.full_like(fates.life_ms, conditions.save_cost_ms + conditions.commit_ms)
    quick = np.where(fates.notice_ms >= 0, np.minimum(save_ms, fates.last_save_ms), save_ms)
    return np.maximum(fates.life_ms - conditions.ready_ms - quick, 0)


class _Story:
    """What has become of all machines so far, run by machine, and what each run has seen."""

    def __init__(self, conditions: Conditions, fates: Fates, runs: int) -> None:
        self.conditions, self.plan = conditions, Plan.of(conditions)
        self.life_ms, self.notice_ms, self.last_save_ms = (
            each.reshape(runs, -1) for each in (fates.life_ms, fates.notice_ms, fates.last_save_ms)
        )
        self.useful_ms, self.save_ms, self.lost_ms, self.idle_ms, self.begun, self.noticed = (
            np.zeros_like(self.life_ms) for _ in range(6)
        )
        self.saves_before, self.preemptions, self.exposure_ms, self.noticed_before = (
            np.zeros(runs, np.int64) for _ in range(4)
        )
        # Machine m, or the next one on which work begins; one past the last where there is none.
        machines = self.life_ms.shape[1]
        works = np.where(self.life_ms > conditions.ready_ms, np.arange(machines), machines)
        works = np.minimum.accumulate(works[:, ::-1], axis=1)[:, ::-1]
        self.next_working = np.concatenate((works, np.full((runs, 1), machines)), axis=1)

    def ended(self, loops: _Loops, which: Ints, useful_ms: Ints, worked_ms: Ints) -> None:
        at = loops.run[which], loops.machine[which]
        self.useful_ms[at], self.lost_ms[at] = useful_ms, worked_ms - useful_ms
        self.save_ms[at], self.begun[at] = loops.saving_ms[which], loops.saves[which]


@dataclass(slots=True, eq=False)
class _Loops:
    """The training loops that run, at the moment when work begins or goes on after a save. One of each run that is not over."""

    run: Ints
    machine: Ints
    gone_ms: Ints
    """When the machine goes."""
    notice_ms: Ints
    """When the notice comes; NEVER_MS without one."""
    now_ms: Ints
    worked_ms: Ints
    saving_ms: Ints
    """Time that saves have stopped the loop."""
    durable_ms: Ints
    """Work that the newest durable save holds, or the one before the newest where that is still in flight."""
    sent_ms: Ints
    """Work that the newest save holds."""
    arrives_ms: Ints
    """When the newest save is durable."""
    saves: Ints
    interval_s: Floats

    def held_ms(self, which: Ints) -> Ints:
        """Work that is durable when the machine goes."""
        arrived = self.arrives_ms[which] <= self.gone_ms[which]
        held: Ints = np.where(arrived, self.sent_ms[which], self.durable_ms[which])
        return held


def _begin(story: _Story) -> _Loops:
    runs = len(story.life_ms)
    # Filled in where the first machine begins.
    gone, notice, now, worked, saving, durable, sent, arrives, saves = np.zeros((9, runs), np.int64)
    loops = _Loops(
        np.arange(runs), np.full(runs, -1), gone, notice, now, worked, saving, durable, sent, arrives, saves,
        np.full(runs, np.nan),
    )  # fmt: skip
    return _go_on(story, loops, np.ones(runs, np.bool_))


def _go_on(story: _Story, loops: _Loops, over: Bools) -> _Loops:
    """Where a machine is over, work begins on the run's next one."""
    if not over.any():
        return loops
    which = np.flatnonzero(over)
    run, machine = loops.run[which], loops.machine[which]
    was = machine >= 0
    _remember(story, run[was], machine[was])
    machine = story.next_working[run, machine + 1]
    loops.machine[which] = machine
    is_left = machine < story.life_ms.shape[1]
    which, run, machine = which[is_left], run[is_left], machine[is_left]
    life_ms, notice_ms = story.life_ms[run, machine], story.notice_ms[run, machine]
    loops.gone_ms[which] = life_ms
    loops.notice_ms[which] = np.where(notice_ms >= 0, np.maximum(life_ms - notice_ms, 0), NEVER_MS)
    loops.now_ms[which] = story.conditions.ready_ms
    for cleared in (
        loops.worked_ms, loops.saving_ms, loops.durable_ms, loops.sent_ms, loops.arrives_ms, loops.saves
    ):  # fmt: skip
        cleared[which] = 0
    loops.interval_s[which] = np.nan
    stays = loops.machine < story.life_ms.shape[1]
    return loops if stays.all() else _Loops(*(getattr(loops, name)[stays] for name in _Loops.__slots__))


def _remember(story: _Story, run: Ints, machine: Ints) -> None:
    story.saves_before[run] += story.begun[run, machine]
    story.preemptions[run] += 1
    story.exposure_ms[run] += story.life_ms[run, machine] - story.conditions.ready_ms
    story.noticed_before[run] += story.noticed[run, machine]


def _asked(rule: IntervalRule, story: _Story, loops: _Loops) -> Floats:
    run = loops.run
    seen = Seen(
        conditions=story.conditions,
        age_s=loops.now_ms / 1000,
        saves=loops.saves,
        saves_before=story.saves_before[run],
        preemptions=story.preemptions[run],
        exposure_s=story.exposure_ms[run] / 1000,
        at_work_s=(loops.now_ms - story.conditions.ready_ms) / 1000,
        noticed=story.noticed_before[run],
        interval_s=loops.interval_s,
    )
    # A copy: it is written to where the next machine begins.
    return np.array(rule.next_interval_s(seen), np.float64)


def _whole_ms(interval_s: Floats) -> Ints:
    if not (interval_s >= 0.0005).all():
        raise UsageError(f"an interval lasts a millisecond at least, not {float(np.min(interval_s))} s")
    whole: Ints = np.rint(np.minimum(interval_s * 1000, NEVER_MS)).astype(np.int64)
    return whole


def _die(story: _Story, loops: _Loops, which: Ints) -> None:
    """Gone without a word while it worked."""
    if len(which):
        worked_ms = loops.worked_ms[which] + loops.gone_ms[which] - loops.now_ms[which]
        story.ended(loops, which, loops.held_ms(which), worked_ms)


def _save(story: _Story, loops: _Loops, save_at_ms: Ints, saves: Bools) -> Bools:
    """Saves begin. Says where the machine goes before the copy is complete."""
    on_ms = save_at_ms + story.conditions.save_cost_ms
    torn = saves & (loops.gone_ms < on_ms)
    # Of machines that are over the figures are no longer looked at, so all may be moved on.
    loops.worked_ms += save_at_ms - loops.now_ms
    loops.saving_ms += np.minimum(loops.gone_ms, on_ms) - save_at_ms
    loops.saves = loops.saves + 1
    which = np.flatnonzero(torn)
    if len(which):
        # All since the save before, which is durable by now, is lost.
        story.ended(loops, which, loops.sent_ms[which], loops.worked_ms[which])
    loops.durable_ms, loops.sent_ms = loops.sent_ms, loops.worked_ms.copy()
    loops.now_ms, loops.arrives_ms = on_ms, on_ms + story.conditions.commit_ms
    return torn


def _leave(story: _Story, loops: _Loops, which: Ints) -> None:
    """A notice is heard, at its moment or when the loop goes on. What is done then ends this machine."""
    if not len(which):
        return
    at = loops.run[which], loops.machine[which]
    gone_ms, notice_ms, now_ms = loops.gone_ms[which], loops.notice_ms[which], loops.now_ms[which]
    heard_ms = np.maximum(notice_ms, now_ms)
    worked_ms = loops.worked_ms[which] + heard_ms - now_ms
    heard = Heard(
        left_ms=gone_ms - heard_ms,
        lead_ms=gone_ms - notice_ms,
        # Of the newest save that has begun, whether or not it is durable yet.
        unsaved_ms=worked_ms - loops.sent_ms[which],
        in_flight_ms=np.maximum(loops.arrives_ms[which] - heard_ms, 0),
        last_save_ms=story.last_save_ms[at],
    )
    end = after_notice(story.plan, heard)
    held_ms = np.where(end.insured, worked_ms, loops.held_ms(which))
    all_ms = worked_ms + end.worked_ms
    held_ms = np.where(end.committed, all_ms, held_ms)
    story.ended(loops, which, held_ms, all_ms)
    story.save_ms[at] += end.save_ms
    story.idle_ms[at] = end.idle_ms
    story.noticed[at] = all_ms == held_ms


def _uptimes(story: _Story, conditions: Conditions, fates: Fates) -> Uptimes:
    shape = fates.life_ms.shape
    start_ms = np.minimum(fates.life_ms, conditions.start_ms)
    is_first = np.arange(shape[1]) == 0
    figures = {
        Bucket.USEFUL: story.useful_ms,
        Bucket.SAVE: story.save_ms,
        Bucket.INITIALISATION: np.where(is_first, start_ms, 0),
        Bucket.RESTORE: np.minimum(fates.life_ms - start_ms, conditions.restore_ms),
        Bucket.RECOVERY: np.where(is_first, 0, start_ms),
        Bucket.LOST: story.lost_ms,
        Bucket.IDLE: story.idle_ms,
    }
    return Uptimes(
        buckets={bucket: each.reshape(shape) for bucket, each in figures.items()},
        uptime_ms=fates.life_ms,
        queue_wait_ms=fates.gap_ms,
        saves=story.begun.reshape(shape),
        noticed=story.noticed.reshape(shape) > 0,
    )
