"""What is remembered of every pool of spot capacity, and how a tick changes it.

    tick: what is known of each pool, prices ──→ learn ──→ rows x pool x window ──→ posteriors of lifetimes, ages, shares of time

A pool is looked at in two ways. By itself: how long its capacity lasts (`up`). And as the dearest of a market, of all pools that
cost no more than it does: how long one waits until any of them has capacity (`down`), and how often a second one has some too.
With one pool both are the same. What is not known in a tick (nobody has asked) changes nothing.

Everything is numbers, so that it can be written down; what was seen counts less as it gets older.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import Bools, Flags, Floats, Ints, Situation
from holdfast.policy.market.beliefs import UNSEEN_AGE_S, Beliefs, Hazard

__all__ = ["Tracks", "as_past", "first_rows", "learn"]

# Rows of one state, up or down. After these, per curve of the belief, the ends that were believed, and then the logarithms of the
# hazards at the ages of the ends that were seen.
_LAST, _SINCE, _AT, _ENDS, _EXPECTED = range(5)
# Rows of shares of time, in seconds: of the pool itself; of its market with capacity, and with a second pool that has some.
# Then how often in a row the pool was found without capacity.
_KNOWN, _UP, _ANY, _TWO, _REFUSALS = range(5)
_EXTRAS = 5
_PRIOR_SHARE, _PRIOR_S = 0.5, 3 * 3600.0
"""A pool of which nothing is known is there half of the time; that counts like so many seconds."""
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 300, 3600
"""A pool that has refused is left alone for so long, and twice as long for every further refusal."""


@dataclass(frozen=True, slots=True)
class Tracks:
    """The memory, parted. Every array is (rows x) pool x window."""

    beliefs: Beliefs
    first: Floats
    """The market at the first look; -1: none yet."""
    down: Floats
    """Of the market of the pools that cost no more than this one."""
    up: Floats
    """Of the pool itself."""
    extras: Floats

    @classmethod
    def of(cls, beliefs: Beliefs, rows: Floats) -> Tracks:
        begin = 1 + _rows(beliefs.down)
        end = begin + _rows(beliefs.up)
        return cls(beliefs, rows[0], rows[1:begin], rows[begin:end], rows[end:])

    def at(self, windows: Ints) -> Tracks:
        """Some of the windows."""
        parts = (self.first, self.down, self.up, self.extras)
        return Tracks(self.beliefs, *(part[..., windows] for part in parts))

    def up_weights(self, points: int) -> Floats:
        """Pool x window x family: how likely each family of lifetimes is."""
        return _posterior(self.beliefs.up, self.up, points)

    def down_weights(self, points: int) -> Floats:
        """As `up_weights`, of the times without capacity in the pool's market."""
        return _posterior(self.beliefs.down, self.down, points)

    def age_s(self, now_s: int) -> Floats:
        """Of the pool's capacity, if it is there. Where it was not when it was last looked at, it has come some time since then."""
        since_s = np.where(self.up[_LAST] == 0, (now_s - self.up[_AT]) / 2, UNSEEN_AGE_S)
        age: Floats = np.where(self.up[_LAST] == 1, now_s - self.up[_SINCE], np.minimum(since_s, UNSEEN_AGE_S))
        return age

    def down_age_s(self, now_s: int) -> Floats:
        """Of the time without capacity in the pool's market."""
        age: Floats = now_s - self.down[_SINCE]
        return age

    def share(self) -> Floats:
        """Of the time, with capacity in the pool."""
        out: Floats = (self.extras[_UP] + _PRIOR_SHARE * _PRIOR_S) / (self.extras[_KNOWN] + _PRIOR_S)
        return out

    def elsewhere(self, cheaper: Ints) -> Floats:
        """How likely another pool of the market has capacity when one loses its; `cheaper`: other pools in it."""
        prior = 1 - (1 - _PRIOR_SHARE) ** cheaper.astype(np.float64)
        out: Floats = (self.extras[_TWO] + prior * _PRIOR_S) / (self.extras[_ANY] + _PRIOR_S)
        return np.where(cheaper > 0, out, 0.0)

    def any_share(self) -> Floats:
        """Of the time, with capacity somewhere in the pool's market."""
        out: Floats = (self.extras[_ANY] + _PRIOR_SHARE * _PRIOR_S) / (self.extras[_KNOWN] + _PRIOR_S)
        return np.minimum(out, 1.0)

    def backs_off(self, now_s: int) -> Bools:
        """Pools that have refused, or lost their capacity, too short a time ago to be asked again."""
        refusals = self.extras[_REFUSALS]
        pause_s = np.minimum(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2.0 ** (np.clip(refusals, 1, 20) - 1))
        off: Bools = (refusals > 0) & (self.up[_LAST] == 0) & (now_s - self.up[_AT] < pause_s)
        return off


def first_rows(beliefs: Beliefs) -> list[float]:
    """Of one pool before the first look."""
    down, up = ([-1.0] + [0.0] * (_rows(hazard) - 1) for hazard in (beliefs.down, beliefs.up))
    return [-1.0, *down, *up, *([0.0] * _EXTRAS)]


def as_past(beliefs: Beliefs, rows: Floats, watched_s: float, worth_s: float) -> Floats:
    """What was learned in a history of this length, as a job's first memory: rates and shares only, no ages, and counted as if it
    had been seen within so many seconds at most."""
    out = rows * min(1.0, worth_s / watched_s)
    begin = 1 + _rows(beliefs.down)
    for track in (out[1:begin], out[begin : begin + _rows(beliefs.up)]):
        track[_LAST], track[_SINCE], track[_AT] = -1.0, 0.0, 0.0
    out[0] = -1.0
    out[begin + _rows(beliefs.up) + _REFUSALS] = 0.0
    return out


def learn(beliefs: Beliefs, situation: Situation, rows: Floats, forget_s: float) -> Floats:
    """The memory with this tick in it: rows x pool x window."""
    known = situation.available
    cheap = situation.microusd_h < situation.on_demand_microusd_h
    own = np.where(known < 0, -1, (known == 1) & cheap).astype(np.float64)
    up, two, market = _markets(known, cheap, situation.microusd_h, own)
    before = Tracks.of(beliefs, rows)
    first = np.where(before.first < 0, market, before.first)
    now_s = situation.now_s
    down = _track(before.down, market, now_s, 0, beliefs.down, forget_s)
    mine = _track(before.up, own, now_s, 1, beliefs.up, forget_s)
    extras = _share(before, own, up, two, now_s, forget_s)
    return np.concatenate([first[None], down, mine, extras])


def _markets(known: Flags, cheap: Bools, microusd_h: Ints, own: Floats) -> tuple[Bools, Bools, Floats]:
    """Of each pool's market: whether any pool is up, whether two are, and 1 up, 0 down, -1 unknown."""
    if len(known) == 1:
        return own == 1, np.zeros_like(cheap), own
    count = np.zeros(known.shape, np.int64)
    open_ = np.zeros(known.shape, np.bool_)
    up = own == 1
    for pool in range(len(known)):
        within = cheap[pool] & (microusd_h[pool] <= microusd_h)
        count += within & up[pool]
        open_ |= within & (known[pool] < 0)
    return count > 0, count > 1, np.where(count > 0, 1.0, np.where(open_, -1.0, 0.0))


def _track(before: Floats, seen: Floats, now_s: int, counted: int, hazard: Hazard, forget_s: float) -> Floats:
    """Count how often and against which odds the state `counted` ended."""
    last, since, at = before[_LAST], before[_SINCE], before[_AT]
    known, first, counts = seen >= 0, last < 0, (seen >= 0) & (last == counted)
    changed = known & ~first & (seen != last)
    passed = hazard.expected(now_s - since) - hazard.expected(at - since)
    kept = np.where(known, np.exp((at - now_s) / forget_s), 1.0)
    logs = _EXPECTED + len(hazard.curves)
    out = np.empty_like(before)
    out[_LAST] = np.where(known, seen, last)
    out[_SINCE] = np.where(changed, now_s, np.where(known & first, now_s - UNSEEN_AGE_S, since))
    out[_AT] = np.where(known, now_s, at)
    out[_ENDS:] = before[_ENDS:] * kept
    out[_ENDS] += counts & changed
    out[_EXPECTED:logs] += counts * passed
    out[logs:] += (counts & changed) * hazard.log_rate(at - since)
    return out


def _share(before: Tracks, own: Floats, up: Bools, two: Bools, now_s: int, forget_s: float) -> Floats:
    last, at = before.up[_LAST], before.up[_AT]
    known = own >= 0
    passed_s = np.where(known & (last >= 0), now_s - at, 0.0)
    kept = np.where(known, np.exp((at - now_s) / forget_s), 1.0)
    out = before.extras * kept
    out[_KNOWN] += passed_s
    out[_UP] += passed_s * (own == 1)
    out[_ANY] += passed_s * up
    out[_TWO] += passed_s * two
    refusals = before.extras[_REFUSALS]
    out[_REFUSALS] = np.where(known, np.where(own == 1, 0.0, refusals + 1), refusals)
    return out


def _rows(hazard: Hazard) -> int:
    return _EXPECTED + 2 * len(hazard.curves)


def _posterior(hazard: Hazard, track: Floats, points: int) -> Floats:
    logs, shape = _EXPECTED + len(hazard.curves), track.shape[1:]
    flat = track.reshape(len(track), -1)
    return hazard.posterior(points, flat[_ENDS], flat[_EXPECTED:logs], flat[logs:]).reshape(*shape, -1)
