"""How long to work between two saves: the published formulas, and nothing else.

All of them weigh the time spent on saves against the time spent on work that is done again. `cost_s` is what one save
costs the loop (stall plus slowdown), not how long its upload takes in the background; `mtbf_s` is the mean time
between preemptions. Both are seconds, `cost_s >= 0` and finite, `mtbf_s > 0`, else UsageError. No cost gives 0 and no
preemptions give infinity; `interval.auto_interval` puts bounds on the result.
"""

from __future__ import annotations

import math

from holdfast.core.errors import UsageError

__all__ = [
    "check_cost_and_mtbf",
    "check_share",
    "daly_s",
    "exact_s",
    "hazard_s",
    "lambert_w0",
    "with_notice_s",
    "young_s",
]


def young_s(cost_s: float, mtbf_s: float) -> float:
    """First-order optimum, seconds of work between saves: √(2·cost·mtbf). J. W. Young, CACM 17(9), 1974.

    Good while `cost_s` is far below `mtbf_s`; too long otherwise.
    """
    check_cost_and_mtbf(cost_s, mtbf_s)
    return math.sqrt(2 * cost_s) * math.sqrt(mtbf_s) if cost_s else 0.0


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """Higher-order optimum, seconds of work between saves. J. T. Daly, FGCS 22(3), 2006.

    Within a fraction of a per cent of `exact_s` while `cost_s < mtbf_s / 2`; `mtbf_s` where saves cost twice that or
    more.
    """
    check_cost_and_mtbf(cost_s, mtbf_s)
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return young_s(cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def exact_s(cost_s: float, mtbf_s: float) -> float:
    """The optimum for exponentially distributed lifetimes, seconds of work between saves: mtbf·[1 +
    W₀(-e^(-1-cost/mtbf))].

    It minimises the expected time per unit of work, (e^((τ+cost)/mtbf) - 1) / τ (Daly 2006); the restart time only
    scales that expression. Never above `mtbf_s`.
    """
    check_cost_and_mtbf(cost_s, mtbf_s)
    if cost_s == 0 or math.isinf(mtbf_s):
        return young_s(cost_s, mtbf_s)
    ratio = cost_s / mtbf_s
    if ratio < 1e-6:
        # W₀ + 1 would cancel beside its branch point: the series in p, whose next term is below 1e-9 of the sum.
        p = math.sqrt(-2 * math.expm1(-ratio))
        return mtbf_s * p * (1 - p / 3 + 11 * p * p / 72)
    return mtbf_s * (1 + lambert_w0(-math.exp(-1 - ratio)))


def with_notice_s(cost_s: float, mtbf_s: float, notice_share: float) -> float:
    """First-order optimum where the share `notice_share` (0 to 1) of preemptions comes with a notice in which a save
    commits.

    Only the others lose an interval: √(2·cost·mtbf / (1 - share)), infinity at 1.
    """
    check_share(notice_share)
    return young_s(cost_s, mtbf_s / (1 - notice_share) if notice_share < 1 else math.inf)


def hazard_s(cost_s: float, hazard_per_s: float) -> float:
    """First-order optimum for the momentary rate of preemptions, per second: √(2·cost / hazard). Infinity at rate 0."""
    if not hazard_per_s >= 0:
        raise UsageError(f"a rate of preemptions is zero or more per second, not {hazard_per_s}")
    return young_s(cost_s, 1 / hazard_per_s if hazard_per_s else math.inf)


def lambert_w0(x: float) -> float:
    """The principal solution w ≥ -1 of w·e^w = x, for x ≥ -1/e (UsageError below), by Halley's iteration."""
    if not x >= -1 / math.e:
        raise UsageError(f"Lambert's W0 is real from -1/e on, not at {x}")
    if x < -0.25:
        p = math.sqrt(max(0.0, 2 * (math.e * x + 1)))
        w = -1 + p * (1 - p / 3 + 11 * p * p / 72)
    else:
        w = math.log1p(x) if x < math.e else math.log(x) - math.log(math.log(x))
    # Cubic convergence from these starts: a handful of rounds; the bound only guards against rounding that flips for
    # ever.
    for _ in range(20):
        if w <= -1:
            return -1.0
        grown = math.exp(w)
        error = w * grown - x
        change = error / (grown * (w + 1) - (w + 2) * error / (2 * w + 2))
        w -= change
        if abs(change) <= 4e-16 * abs(w):
            break
    return w


def check_cost_and_mtbf(cost_s: float, mtbf_s: float) -> None:
    """UsageError unless both lie in the domain of the formulas."""
    if not (cost_s >= 0 and math.isfinite(cost_s)):
        raise UsageError(f"the cost of a save is zero or more seconds, not {cost_s}")
    if not mtbf_s > 0:
        raise UsageError(f"the mean time between preemptions is more than zero seconds, not {mtbf_s}")


def check_share(notice_share: float) -> None:
    """UsageError unless it is a share."""
    if not 0 <= notice_share <= 1:
        raise UsageError(f"the share of preemptions with a notice lies between 0 and 1, not at {notice_share}")
