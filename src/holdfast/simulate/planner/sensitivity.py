"""Which assumptions decide: each by itself at its low and its high end, the rest as they are, with the same luck.

What follows from a figure moves with it: a larger checkpoint stalls longer, is read longer, and may not fit the notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from holdfast.core.errors import UsageError
from holdfast.policy.market.registry import policy_named
from holdfast.simulate.planner.assumed import LABELS, Assumptions, assume
from holdfast.simulate.planner.case import Case, Hardware
from holdfast.simulate.planner.markets import make_worlds
from holdfast.simulate.planner.montecarlo import Option, option_of, play
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.terms import terms_of

__all__ = ["End", "Lever", "levers_of", "sensitivity"]

_LEADING = frozenset({"checkpoint_bytes", "bandwidth"})
_LEAST_SHARE = 0.003


@dataclass(frozen=True, slots=True)
class End:
    """What comes out at one end of the range."""

    value: float
    cost_usd: float
    p_deadline: float | None
    p_budget: float | None


@dataclass(frozen=True, slots=True)
class Lever:
    """One assumption."""

    name: str
    label: str
    likely: float
    low: End
    high: End
    origin: str

    @property
    def swing_usd(self) -> float:
        return abs(self.high.cost_usd - self.low.cost_usd)

    @property
    def swing_p(self) -> float:
        return abs((self.high.p_deadline or 0.0) - (self.low.p_deadline or 0.0))


def levers_of(assumed: Assumptions) -> list[str]:
    """The figures that are not known for sure."""
    return [field.name for field in fields(assumed) if not getattr(assumed, field.name).is_known]


def sensitivity(
    case: Case,
    hardware: Hardware,
    pools: tuple[Price, ...],
    mix: str,
    *,
    samples: int,
    seed: int,
    tell: Callable[[], None],
) -> tuple[float, tuple[Lever, ...]]:
    """The cost with everything as assumed, and the levers, the strongest first; those that move nothing are left out."""
    assumed = assume(case, hardware)

    def cost(these: Assumptions) -> Option:
        terms = terms_of(case, hardware, pools, these, rough=True, short=policy_named(mix).keeps_deadline)
        worlds = make_worlds(terms, these, pools, samples, seed)
        return option_of(case, str(hardware.accelerator), (), mix, play(case, terms, worlds, mix))

    base = cost(assumed).cost_usd.mean
    found = list(_levers(case, hardware, assumed, cost, tell))
    strongest = sorted(found, key=lambda lever: (-lever.swing_usd, -lever.swing_p))
    kept = [lever for lever in strongest if lever.swing_usd > _LEAST_SHARE * base or lever.swing_p >= 0.01]
    return base, tuple(kept)


def _levers(
    case: Case,
    hardware: Hardware,
    assumed: Assumptions,
    cost: Callable[[Assumptions], Option],
    tell: Callable[[], None],
) -> Iterator[Lever]:
    for name in levers_of(assumed):
        figure = getattr(assumed, name)
        ends = []
        for value in (figure.low, figure.high):
            option = cost(_with(case, hardware, assumed, name, value))
            ends.append(End(value, option.cost_usd.mean, option.p_deadline, option.p_budget))
            tell()
        yield Lever(name, LABELS[name], figure.likely, ends[0], ends[1], figure.origin.value)


def _with(case: Case, hardware: Hardware, assumed: Assumptions, name: str, value: float) -> Assumptions:
    figure = getattr(assumed, name).only(value)
    if name in _LEADING:
        try:
            return assume(replace(case, known=replace(case.known, **{name: figure})), hardware)
        except UsageError:
            pass
    return replace(assumed, **{name: figure})
