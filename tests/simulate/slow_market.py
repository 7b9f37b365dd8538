"""The market again, slowly: second by second, in fractions, one window at a time, with the published rules written down anew.

Nothing of the simulator and no policy is used here; plain facts come in and go out. The simulator is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache

WAIT, DEMAND = "wait", "on-demand"
Target = int | str
"""A pool's number, or one of the two above."""


@dataclass(frozen=True)
class World:
    """One window. Rows are pools, columns ticks from the window's start."""

    tick_s: int
    machines: tuple[tuple[int, ...], ...]
    prices: tuple[tuple[int, ...], ...]
    on_demand: int
    work_s: int
    deadline_s: int
    changeover_s: int
    saves_every_s: int = 0
    gang: int = 1
    asks: bool = False
    horizon_s: int = 0
    refund_within_s: int = 0
    moves: tuple[tuple[int, ...], ...] = ()
    """What it costs to bring the data from pool to pool."""

    @property
    def ends_s(self) -> int:
        return self.horizon_s or self.deadline_s

    def move(self, home: Target, to: Target) -> int:
        return self.moves[home][to] if self.moves and isinstance(home, int) and isinstance(to, int) else 0

    def there(self, pool: int, tick: int) -> bool:
        return self.machines[pool][tick] >= self.gang


@dataclass(frozen=True)
class View:
    """What a rule may look at."""

    world: World
    now_s: int
    left_s: int
    on: Target
    warming_s: int
    known: tuple[bool | None, ...]
    prices: tuple[int, ...]

    @property
    def spare_s(self) -> int:
        return self.world.deadline_s - self.now_s - self.left_s

    @property
    def best(self) -> int | None:
        """The cheapest pool that has capacity, or may have."""
        can = [
            (price, known is None, pool)
            for pool, (known, price) in enumerate(zip(self.known, self.prices, strict=True))
            if known is not False and price < self.world.on_demand * self.world.gang
        ]
        return min(can)[2] if can else None


Rule = Callable[[View], Target]


@dataclass
class Ending:
    """What became of the window."""

    spot: Fraction = Fraction(0)
    on_demand: Fraction = Fraction(0)
    refund: Fraction = Fraction(0)
    egress: int = 0
    finish_s: int = -1
    lost_s: int = 0
    changeover_s: int = 0
    waiting_s: int = 0
    spot_s: int = 0
    on_demand_s: int = 0
    left_s: int = 0
    preemptions: int = 0
    spot_launches: int = 0
    on_demand_launches: int = 0
    decisions: list[Target] = field(default_factory=list)
    """One per tick, as long as there is work left."""


def play(world: World, rule: Rule) -> Ending:
    end, warming, unsaved, left = Ending(), 0, 0, world.work_s
    on: Target = WAIT
    home: Target = WAIT
    age, paid = 0, Fraction(0)
    for now in range(world.ends_s):
        tick = now // world.tick_s
        if now % world.tick_s == 0:
            if isinstance(on, int) and not world.there(on, tick):
                end.preemptions += 1
                end.lost_s += unsaved
                left += unsaved
                if age < world.refund_within_s:
                    end.refund += paid
                on, warming = WAIT, 0
            target = _ask(world, rule, now, tick, left, on, warming)
            end.decisions.append(target)
            if target != on:
                on, unsaved, age, paid = target, 0, 0, Fraction(0)
                end.egress += world.move(home, on)
                home = on if isinstance(on, int) else home
                warming = 0 if on == WAIT else world.changeover_s
                end.spot_launches += isinstance(on, int)
                end.on_demand_launches += on == DEMAND
        if on == WAIT:
            end.waiting_s += 1
            continue
        age += 1
        if isinstance(on, int):
            second = Fraction(world.prices[on][tick] * world.gang, 3600)
            end.spot, end.spot_s, paid = end.spot + second, end.spot_s + 1, paid + second
        else:
            end.on_demand, end.on_demand_s = (
                end.on_demand + Fraction(world.on_demand * world.gang, 3600),
                end.on_demand_s + 1,
            )
        if warming:
            warming, end.changeover_s = warming - 1, end.changeover_s + 1
            continue
        left -= 1
        unsaved = 0 if unsaved + 1 == world.saves_every_s or not world.saves_every_s else unsaved + 1
        if left == 0:
            end.finish_s = now + 1
            break
    end.left_s = left
    return end


def _ask(world: World, rule: Rule, now: int, tick: int, left: int, on: Target, warming: int) -> Target:
    pools = range(len(world.machines))
    truth = [world.there(pool, tick) for pool in pools]
    known: list[bool | None] = [None if world.asks and pool != on else truth[pool] for pool in pools]
    prices = tuple(world.prices[pool][tick] * world.gang for pool in pools)
    while True:
        target = rule(View(world, now, left, on, warming, tuple(known), prices))
        if not isinstance(target, int) or truth[target]:
            return target
        assert known[target] is None, "chose a pool without capacity"
        known[target] = False


# The rules, from their descriptions. d is the changeover, L what a preemption may take back.


def on_demand_only(_: View) -> Target:
    return DEMAND


def spot_only(view: View) -> Target:
    if isinstance(view.on, int):
        return view.on
    return WAIT if view.best is None else view.best


def greedy(view: View) -> Target:
    if view.on == DEMAND:
        return DEMAND
    return _forced(view, WAIT)


def uniform_progress(view: View, *, waits_on_demand: bool = True) -> Target:
    world = view.world
    done = Fraction(world.work_s - view.left_s)
    pace = Fraction(world.work_s, world.deadline_s)
    if view.on == DEMAND:
        if done < (view.now_s + 2 * world.changeover_s) * pace:
            return DEMAND
        if (spot := _idle_spot(view)) is not None:
            return spot
        return DEMAND if waits_on_demand or not _may_wait(view) else WAIT
    return _forced(view, DEMAND if done < view.now_s * pace else WAIT)


def uniform_progress_as_written(view: View) -> Target:
    return uniform_progress(view, waits_on_demand=False)


def _forced(view: View, otherwise: Target) -> Target:
    for target in (_careful(view), _idle_spot(view), _net(view)):
        if target is not None:
            return target
    return otherwise


def _careful(view: View) -> Target | None:
    """On spot: stay, unless a preemption at the next tick could make the job late and a move now would not."""
    if not isinstance(view.on, int):
        return None
    d, most_lost = view.world.changeover_s, view.world.saves_every_s
    after_preemption = view.spare_s - min(view.warming_s, view.world.tick_s) - most_lost
    return DEMAND if after_preemption < d <= view.spare_s else view.on


def _idle_spot(view: View) -> Target | None:
    return view.best if view.spare_s >= 2 * view.world.changeover_s + view.world.saves_every_s else None


def _may_wait(view: View) -> bool:
    d, most_lost = view.world.changeover_s, view.world.saves_every_s
    return view.spare_s - view.world.tick_s >= d and view.spare_s >= 2 * d + most_lost


def _net(view: View) -> Target | None:
    return None if _may_wait(view) else DEMAND


RULES: dict[str, Rule] = {
    "greedy": greedy,
    "uniform-progress": uniform_progress,
    "uniform-progress-as-written": uniform_progress_as_written,
    "on-demand": on_demand_only,
    "spot": spot_only,
}


def cheapest(world: World) -> Fraction | None:
    """The least that any sequence of decisions in time can cost: all of them are tried, with nothing assumed about them."""
    world = replace(world, saves_every_s=0)

    @cache
    def least(tick: int, left: int, on: Target, warming: int, home: Target) -> int | None:
        start_s = tick * world.tick_s
        if start_s >= world.deadline_s:
            return None
        length_s = min(world.tick_s, world.deadline_s - start_s)
        options: list[int] = []
        targets: list[Target] = [WAIT, DEMAND]
        targets += [pool for pool in range(len(world.machines)) if world.there(pool, tick)]
        for target in targets:
            still = (warming if target == on else world.changeover_s) if target != WAIT else 0
            price = world.prices[target][tick] if isinstance(target, int) else world.on_demand
            warm = min(still, length_s)
            worked = 0 if target == WAIT else min(left, length_s - warm)
            used = warm + worked if target != WAIT else 0
            cost = price * world.gang * used + (3600 * world.move(home, target) if target != on else 0)
            base = target if isinstance(target, int) else home
            if left == worked:
                options.append(cost)
            elif (rest := least(tick + 1, left - worked, target, still - warm, base)) is not None:
                options.append(cost + rest)
        return min(options, default=None)

    seconds_times_hourly = least(0, world.work_s, WAIT, 0, WAIT)
    return None if seconds_times_hourly is None else Fraction(seconds_times_hourly, 3600)
