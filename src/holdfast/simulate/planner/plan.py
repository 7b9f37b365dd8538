"""A plan: every mix on every set of pools played, the best of them chosen, and what that choice rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError
from holdfast.simulate.planner.assumed import Assumptions, assume
from holdfast.simulate.planner.breakeven import BreakEven, break_even
from holdfast.simulate.planner.case import MIXES, Case, Hardware
from holdfast.simulate.planner.checklist import Point, checklist
from holdfast.simulate.planner.markets import make_worlds
from holdfast.simulate.planner.montecarlo import Option, option_of, play
from holdfast.simulate.planner.pilot import Pilot, pilot_of
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.sensitivity import Lever, levers_of, sensitivity
from holdfast.simulate.planner.terms import Terms, terms_of
from holdfast.simulate.planner.verdict import Against, Obstacle, Verdict, judge, obstacles_of, recommend

__all__ = ["NOT_MODELLED", "Plan", "Sampling", "Setting", "make_plan"]

_SINGLES = 2
_FEW = 100
_FAILS_AFTER_S = 30 * 86400.0
"""How long a machine lasts that nobody takes away."""
NOT_MODELLED = (
    "on-demand capacity is always there, at the table's price",
    "the work takes as long as was said: probabilities do not contain that it takes longer (see the sensitivity)",
    "prices do not move while the job runs; buying does not move the market",
    "the start of a new machine does not overlap with the old one's work",
    "storage, egress between regions and idle time of people are not in the cost",
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How much luck is drawn."""

    samples: int = 400
    seed: int = 1
    with_levers: bool = True
    """Whether the sensitivity is worked out; it takes most of the time."""

    def __post_init__(self) -> None:
        if not 20 <= self.samples <= 5000 or not 0 <= self.seed < 1 << 31:
            raise UsageError("a plan draws 20 to 5,000 samples, from a seed of 0 to 2147483647")

    @property
    def fewer(self) -> int:
        """For what is compared only with itself."""
        return max(20, min(self.samples // 4, 150))


@dataclass(frozen=True, slots=True)
class Setting:
    """One hardware on one set of pools."""

    hardware: Hardware
    pools: tuple[Price, ...]
    assumed: Assumptions
    terms: Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that the page shows."""

    case: Case
    sampling: Sampling
    verdict: Verdict
    best: Option | None
    """None where nothing was played: serving."""
    subject: Option | None
    """What the sensitivity is about: `best`, or where that is on-demand, the best mix with spot."""
    options: tuple[Option, ...]
    setting: Setting
    """Of `subject`; where nothing was played, of the first hardware."""
    even: BreakEven | None
    base_usd: float | None
    """Of `subject` with fewer samples: what the levers are compared with."""
    levers: tuple[Lever, ...]
    pilot: Pilot | None
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    def meets(self) -> bool:
        """Whether deadline and budget are met with the wanted confidence."""
        chances = () if self.best is None else (self.best.p_deadline, self.best.p_budget)
        return self.best is not None and all(chance is None or chance >= self.case.confidence for chance in chances)


def make_plan(
    case: Case, sampling: Sampling | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Plan:
    """Play everything. Deterministic: the same case and sampling make the same plan."""
    sampling = sampling or Sampling()
    if case.serving:
        return _serving(case, sampling, _on_demand(case, case.hardware[0], sampling))
    todo = [each for hardware in case.hardware for each in _todo(case, hardware, sampling)]
    if not todo:
        raise UsageError("every pool costs more than the ceiling on the hourly price; nothing is left to plan with")
    ends = 2 * max(len(levers_of(setting.assumed)) for setting, _ in todo) if sampling.with_levers else 0
    steps = _Steps(on_progress, len(todo) + ends + 1)
    played = list(_played(case, sampling, todo, steps.take))
    options = _with_savings([option for option, _ in played])
    best = recommend(case, options)
    spots = [each for each in options if not each.is_on_demand]
    subject = best if not best.is_on_demand or not spots else recommend(case, spots)
    setting = next(
        where for option, where in zip(options, (where for _, where in played), strict=True) if option is subject
    )
    even = break_even(
        setting.terms,
        setting.pools,
        setting.assumed.shape.likely,
        samples=min(48, sampling.samples),
        seed=sampling.seed,
    )
    steps.take()
    base, levers = (None, ()) if not sampling.with_levers else sensitivity(
        case, setting.hardware, setting.pools, subject.mix, samples=sampling.fewer, seed=sampling.seed, tell=steps.take
    )  # fmt: skip
    steps.finish()
    obstacles = obstacles_of(case, setting.terms, even)
    return Plan(
        case=case,
        sampling=sampling,
        verdict=judge(case, options, best, obstacles, _sentence(case, best)),
        best=best,
        subject=subject,
        options=tuple(options),
        setting=setting,
        even=even,
        base_usd=base,
        levers=levers,
        pilot=pilot_of(setting.terms, setting.assumed, setting.pools[0], even),
        points=checklist(case, setting.terms, setting.pools, best),
        notes=case.notes,
    )


def _todo(case: Case, hardware: Hardware, sampling: Sampling) -> Iterator[tuple[Setting, str]]:
    """What is played. Mixes that fall back to on-demand need its price, a deadline, and a state to move with."""
    plain = _on_demand(case, hardware, sampling)
    demand = _affordable(case, plain.pools[0].on_demand_usd_h)
    if demand:
        yield plain, "on-demand"
    if case.floor == case.machines:
        return
    moves = demand and case.deadline_s is not None and (case.saves or case.tasks)
    assumed = assume(case, hardware)
    for pools in _pool_sets(case, hardware):
        terms = terms_of(case, hardware, pools, assumed, rough=sampling.samples < _FEW)
        for mix in MIXES:
            if mix == "spot" or (moves and mix != "on-demand"):
                yield Setting(hardware, pools, assumed, terms), mix


def _on_demand(case: Case, hardware: Hardware, sampling: Sampling) -> Setting:
    """Where it costs least. Machines that nobody takes away need fewer saves."""
    pools = (min(hardware.pools, key=lambda pool: pool.on_demand_usd_h),)
    assumed = assume(case, hardware)
    lasting = replace(assumed, life_s=assumed.life_s.only(_FAILS_AFTER_S), gang=assumed.gang.only(0.0))
    return Setting(hardware, pools, assumed, terms_of(case, hardware, pools, lasting, rough=sampling.samples < _FEW))


def _pool_sets(case: Case, hardware: Hardware) -> list[tuple[Price, ...]]:
    """Each of the cheapest pools alone, and per provider all of its pools: a move inside one needs no other copy."""
    under = tuple(pool for pool in hardware.pools if _affordable(case, pool.spot_usd_h))
    sets: list[tuple[Price, ...]] = []
    costs = set()
    for pool in under:
        if len(sets) < _SINGLES and (pool.provider, pool.spot_usd_h) not in costs:
            sets.append((pool,))
            costs.add((pool.provider, pool.spot_usd_h))
    for provider in dict.fromkeys(pool.provider for pool in under):
        group = tuple(pool for pool in under if pool.provider == provider)
        if len(group) > 1:
            sets.append(group)
    return sets


def _affordable(case: Case, usd_h: float) -> bool:
    return case.ceiling_usd_h is None or usd_h <= case.ceiling_usd_h


def _played(
    case: Case, sampling: Sampling, todo: list[tuple[Setting, str]], tell: Callable[[], None]
) -> Iterator[tuple[Option, Setting]]:
    worlds, of = None, None
    for setting, mix in todo:
        if worlds is None or of is None or of.terms is not setting.terms:
            worlds, of = (
                make_worlds(setting.terms, setting.assumed, setting.pools, sampling.samples, sampling.seed),
                setting,
            )
        played = play(case, setting.terms, worlds, mix)
        names = [pool.pool for pool in setting.pools]
        tell()
        yield option_of(case, str(setting.hardware.accelerator), names, mix, played), setting


def _with_savings(options: list[Option]) -> list[Option]:
    on_demand = min((each.cost_usd.mean for each in options if each.is_on_demand), default=None)
    if not on_demand:
        return options
    return [replace(each, saving=1 - each.cost_usd.mean / on_demand) for each in options]


def _sentence(case: Case, best: Option) -> str:
    end = f"done in about {format_duration(best.finish_s.middle)}" if best.p_finished > 0.5 else "often not done"
    saved = "" if best.saving is None else f", {best.saving:.0%} less than on-demand"
    return f"Spot is worth it: {best.mix} costs about ${best.cost_usd.mean:,.0f}{saved}, {end}."


def _serving(case: Case, sampling: Sampling, setting: Setting) -> Plan:
    """There is no work to finish, so there is nothing to play."""
    notice_s = min(pool.notice_s for pool in setting.pools)
    why = Obstacle(
        Against.SERVING,
        f"a latency-critical server on spot can be gone {format_duration(notice_s)} after a notice, or without one, and a new one "
        f"needs {format_duration(setting.assumed.changeover_s.likely)}: keep what the traffic needs on on-demand, and only what is "
        "above that on spot",
    )
    return Plan(
        case=case,
        sampling=sampling,
        verdict=Verdict(
            worth=False, headline=f"Spot is not worth it here, because {why.says}.", because=(why,), cautions=(),
            on_demand_usd=None, saved_usd=None, engineering_usd=case.engineering_usd, net_usd=None, runs_to_pay=None,
        ),
        best=None, subject=None, options=(), setting=setting, even=None, base_usd=None, levers=(), pilot=None, points=(),
        notes=case.notes,
    )  # fmt: skip


class _Steps:
    """Counts what is done."""

    def __init__(self, on_progress: Callable[[int, int], None], total: int) -> None:
        self.on_progress, self.total, self.done = on_progress, total, 0
        on_progress(0, total)

    def take(self) -> None:
        self.done = min(self.done + 1, self.total)
        self.on_progress(self.done, self.total)

    def finish(self) -> None:
        self.on_progress(self.total, self.total)
