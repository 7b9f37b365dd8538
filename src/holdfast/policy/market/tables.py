"""What the rest of a job costs on average, for every position that it can be in: solved backwards from the deadline, once, ahead.

A position is (time left, slack, state and age of spot capacity, what runs). Slack is the time left less the work left: work
leaves it alone, a wait takes a step from it, a start takes the changeover. Costs are in seconds of on-demand capacity, spot
capacity costs `spot` of them per second.

    working(t, s) = price x step + E working'(t - step, s)                    a preemption: idle(t - step, s - lost)
    start(t, s)   = the changeover, in which spot capacity may be taken: paid for, and slack is gone with it; then working
    idle(t, s)    = min of  E idle'(t - step, s - step)  (wait),  start on spot (while it is up),  start on on-demand
    on-demand     = min of  working on on-demand,  idle

E is over one step of the semi-Markov chain of up and down: hazards by bucket of age (`beliefs`), and an age that moves into the
next bucket at the rate that a bucket's width gives. Where there are several pools, an up state is that of the pool in use, and when
it ends another one is there at once with a chance that is known (`elsewhere`). All this at once for every pair of families of
hazards, of up and of down; at run time their posterior weighs the results. The limits of `safety` hold here as well, so the table
knows what they cost.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from holdfast.policy.market.arrays import Floats, Ints
from holdfast.policy.market.beliefs import AGE_EDGES_S, AGES, UNSEEN_AGE_S, Beliefs, bucket_of, mean_h

__all__ = ["POINTS", "START_DEMAND", "START_SPOT", "STAY", "WAIT", "Table", "Terms", "solve"]

Singles: TypeAlias = NDArray[np.float32]

POINTS = 5
"""Factors per shape and state."""
WAIT, START_SPOT, START_DEMAND, STAY = range(4)
"""Actions. STAY: to go on on on-demand, where it runs."""
_MOST_STEPS, _MOST_CELLS = 600, 160
_KEPT_TIMES, _KEPT_SLACKS = 80, 60


@dataclass(frozen=True, slots=True)
class Terms:
    """What a table depends on besides beliefs. Seconds."""

    horizon_s: int
    """The most time that may be left."""
    slack_s: int
    """The most slack."""
    tick_s: int
    changeover_s: int
    lost_s: int
    spot: float
    """Price by the on-demand price."""
    elsewhere: float = 0.0
    """How likely another pool has capacity when the one that was used loses it."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Expected cost per action, by time left, slack, state (up first, then down, each by age) and family."""

    costs: Singles
    """time x slack x state x action x family."""
    time_s: float
    """Distance of two times."""
    slack_s: float
    up_share: Floats
    """Per family: share of the time with capacity."""

    def expect(self, left_s: Ints | Floats, slack_s: Ints | Floats, state: Ints, weights: Floats) -> Floats:
        """Window x action, in seconds of on-demand capacity. `weights` is window x family."""
        times, slacks = self.costs.shape[:2]
        t = np.clip(left_s / self.time_s, 0, times - 1.001)
        s = np.clip(slack_s / self.slack_s, 0, slacks - 1.001)
        t0, s0 = t.astype(np.int64), s.astype(np.int64)
        likely = weights.astype(np.float32)[:, None, :]
        out = np.zeros((len(t), 4))
        for more_t in (0, 1):
            for more_s in (0, 1):
                share = np.abs(1 - more_t - (t - t0)) * np.abs(1 - more_s - (s - s0))
                rows = self.costs[t0 + more_t, s0 + more_s, state]
                out += share[:, None] * (rows * likely).sum(axis=2)
        return out


@lru_cache(maxsize=24)
def solve(beliefs: Beliefs, terms: Terms) -> Table:
    """Seconds of computing at most, tens of megabytes at most; kept."""
    return _Backwards(beliefs, terms).run()


class _Backwards:
    """One run from the deadline to the horizon. Arrays are family x state x slack."""

    def __init__(self, beliefs: Beliefs, terms: Terms) -> None:
        self.terms = terms
        ticks = max(terms.horizon_s / _MOST_STEPS, terms.slack_s / _MOST_CELLS, 1) / terms.tick_s
        self.step_s = terms.tick_s * math.ceil(ticks)
        self.steps = -(-terms.horizon_s // self.step_s)
        self.cells = terms.slack_s // self.step_s + 2
        self.slack_s = np.arange(self.cells) * self.step_s
        # The changeover in steps; what is left of the last of them is worked.
        self.launch = max(1, -(-terms.changeover_s // self.step_s))
        self.spare_s = self.launch * self.step_s - terms.changeover_s
        pairs = [(up, down) for up in beliefs.up.families(POINTS) for down in beliefs.down.families(POINTS)]
        self.other = int(bucket_of(np.array(UNSEEN_AGE_S)))
        self.chain = np.stack([self._chain(up, down) for up, down in pairs]).astype(np.float32)
        self.alive, self.gone = self.chain[:, :AGES, :AGES].copy(), self.chain[:, :AGES, AGES].copy()
        self.chain[:, :AGES, AGES] -= np.float32(terms.elsewhere) * self.gone
        self.chain[:, :AGES, self.other] += np.float32(terms.elsewhere) * self.gone
        lasts = [(mean_h(up) / (1 - min(terms.elsewhere, 0.999)), mean_h(down)) for up, down in pairs]
        share = np.array([up_h / (up_h + down_h) for up_h, down_h in lasts])
        # Whatever is seen first, no family is impossible.
        self.up_share = np.clip(share, 1e-6, 1 - 1e-6)

    def _chain(self, up_per_h: tuple[float, ...], down_per_h: tuple[float, ...]) -> Floats:
        """Probabilities of one step, state x state."""
        chain = np.zeros((2 * AGES, 2 * AGES))
        widths = np.diff(AGE_EDGES_S)
        for state, per_h in enumerate((up_per_h, down_per_h)):
            for age in range(AGES):
                ends = -math.expm1(-per_h[age] * self.step_s / 3600)
                older = min(1.0, self.step_s / widths[age]) if age < AGES - 1 else 0.0
                row, other = state * AGES + age, (1 - state) * AGES
                chain[row, other] += ends
                chain[row, row] += (1 - ends) * (1 - older)
                if older:
                    chain[row, row + 1] += (1 - ends) * older
        return chain

    def run(self) -> Table:
        families, shape = len(self.chain), (len(self.chain), 2 * AGES, self.cells)
        every_t, every_s = -(-self.steps // _KEPT_TIMES), -(-self.cells // _KEPT_SLACKS)
        kept = np.zeros(
            (-(-self.steps // every_t) + 2, -(-self.cells // every_s) + 1, 2 * AGES, 4, families), np.float32
        )
        zeros = np.zeros(shape, np.float32)
        # Newest first, as far back as a launch reaches.
        self.spot: deque[Singles] = deque([zeros[:, :AGES]] * self.launch, maxlen=self.launch)
        self.idle: deque[Singles] = deque([zeros] * self.launch, maxlen=self.launch)
        self.demand: deque[Singles] = deque([zeros] * self.launch, maxlen=self.launch)
        self._prepare_launch()
        picked = np.minimum(np.arange(kept.shape[1]) * every_s, self.cells - 1)
        for step in range(1, (kept.shape[0] - 1) * every_t + 1):
            costs = self._step(step * self.step_s)
            if step % every_t == 0:
                kept[step // every_t] = costs[:, :, :, picked].transpose(3, 2, 0, 1)
        return Table(kept, every_t * self.step_s, every_s * self.step_s, self.up_share)

    def _prepare_launch(self) -> None:
        self.after_launch: Singles = np.linalg.matrix_power(self.chain, self.launch)
        alive = np.broadcast_to(np.eye(AGES, dtype=np.float32), self.alive.shape)
        self.lost_at: list[Singles] = []
        for _ in range(self.launch):
            self.lost_at.append((alive @ self.gone[:, :, None])[:, :, :1])
            alive = alive @ self.alive
        self.launched: Singles = alive

    def _step(self, left_s: int) -> Singles:
        """Costs of the four actions with so much time left: action x family x state x slack."""
        terms, step_s, chain = self.terms, np.float32(self.step_s), self.chain
        spot, idle, demand = self.spot[0], self.idle[0], self.demand[0]
        work_s = np.maximum(left_s - self.slack_s, 0).astype(np.float32)
        worked_s, goes_on = np.minimum(work_s, step_s), work_s > step_s
        lost = self._later(self._taken(idle), terms.lost_s / 2)
        on_spot = self.alive @ spot + self.gone[:, :, None] * lost
        costs = np.empty((4, *idle.shape), np.float32)
        costs[STAY] = worked_s + goes_on * (chain @ demand)
        costs[START_DEMAND] = self._start_demand(work_s)
        wait = (work_s > 0) * (chain @ self._later(idle, self.step_s))
        least_s = terms.changeover_s + max(self.step_s, terms.changeover_s + terms.lost_s)
        # Where safety forbids an action, it is no better than on-demand.
        costs[WAIT] = np.where(self.slack_s >= least_s, wait, np.maximum(wait, costs[START_DEMAND]))
        costs[START_SPOT] = costs[START_DEMAND]
        safe = self.slack_s >= 2 * terms.changeover_s + terms.lost_s
        start = self._start_spot(work_s)
        costs[START_SPOT, :, :AGES] = np.where(safe, start, np.maximum(start, costs[START_DEMAND, :, :AGES]))
        best = costs[: START_DEMAND + 1].min(axis=0)
        self.spot.appendleft(np.float32(terms.spot) * worked_s + goes_on * on_spot)
        self.idle.appendleft(best)
        self.demand.appendleft(np.minimum(costs[STAY], best))
        return costs

    def _start_demand(self, work_s: Singles) -> Singles:
        ready = self.after_launch @ self._later(self.demand[-1], self.terms.changeover_s)
        cost: Singles = np.where(
            work_s <= self.spare_s, work_s + self.terms.changeover_s, ready + self.launch * self.step_s
        )
        return cost

    def _start_spot(self, work_s: Singles) -> Singles:
        terms, spot = self.terms, np.float32(self.terms.spot)
        cost = self.launched @ self._later(self.spot[-1], terms.changeover_s) + spot * self.launch * self.step_s
        for number, lost in enumerate(self.lost_at, start=1):
            gone = self._later(self._taken(self.idle[number - 1]), min(number * self.step_s, terms.changeover_s))
            # `cost` above has charged the whole launch to everybody.
            cost = cost + lost * (gone - spot * (self.launch - number) * self.step_s)
        short: Singles = np.where(work_s <= self.spare_s, spot * (work_s + terms.changeover_s), cost)
        return short

    def _taken(self, idle: Singles) -> Singles:
        """Where it is left when its capacity is taken: nothing is there from now on, or another pool is."""
        if not self.terms.elsewhere:
            return idle[:, AGES : AGES + 1]
        other = np.float32(self.terms.elsewhere)
        left: Singles = (1 - other) * idle[:, AGES : AGES + 1] + other * idle[:, self.other : self.other + 1]
        return left

    def _later(self, values: Singles, by_s: float) -> Singles:
        """The same with less slack; what would be below zero is at zero."""
        at = np.maximum(np.arange(self.cells) - by_s / self.step_s, 0)
        low = at.astype(np.int64)
        high = np.minimum(low + 1, self.cells - 1)
        share = (at - low).astype(np.float32)
        if not share.any():
            return values[:, :, low]
        shifted: Singles = values[:, :, low] * (1 - share) + values[:, :, high] * share
        return shifted
