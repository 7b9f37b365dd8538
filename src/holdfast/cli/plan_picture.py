"""The pictures of `holdfast plan --html`, as SVG: places along the x axis are percentages, everything else is in pixels, so that on
a phone the lines become shorter and the words stay readable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from holdfast.cli.plan_tables import about_usd
from holdfast.cli.report_picture import nice_ticks
from holdfast.simulate.planner.montecarlo import Option

__all__ = ["curves_svg", "dollars_axis", "lever_svg", "strip_svg"]

_STRIP_PX, _PLOT_PX, _AXIS_PX = 20, 170, 22
_SHARES = tuple(0.025 + 0.05 * number for number in range(20))
"""Of the samples, what lies below the points of a curve."""


def strip_svg(option: Option, most: float, limit: float | None) -> str:
    """From 5 % to 95 % of the cost, the mean marked."""
    band, kind = option.cost_usd, " demand" if option.is_on_demand else ""
    middle = _STRIP_PX / 2
    title = f"{about_usd(band.low)} to {about_usd(band.high)}, mean {about_usd(band.mean)}"
    parts = [f'<svg width="100%" height="{_STRIP_PX}"><title>{title}</title>']
    if limit is not None:
        parts.append(_upright("limit", limit / most, 0, _STRIP_PX))
    parts.append(
        f'<line class="band{kind}" x1="{_percent(band.low / most)}" x2="{_percent(band.high / most)}" y1="{middle}" y2="{middle}"/>'
    )
    parts.append(f'<circle class="mean{kind}" cx="{_percent(band.mean / most)}" cy="{middle}" r="4.5"/></svg>')
    return "".join(parts)


def dollars_axis(most: float) -> str:
    """Words below the strips."""
    words = [_word(tick / most, about_usd(tick) if tick else "$0", 13) for tick in nice_ticks(0.0, most)]
    return f'<svg width="100%" height="18">{"".join(words)}</svg>'


def lever_svg(low_usd: float, high_usd: float, base: float, least: float, most: float) -> str:
    """Two bars from the middle line: one to each end of the range."""
    scale = (most - least) or 1.0
    parts = ['<svg width="100%" height="22">']
    for kind, value, y in (("low", low_usd, 3), ("high", high_usd, 12)):
        begin, end = sorted((base, value))
        parts.append(
            f'<rect class="{kind}" x="{_percent((begin - least) / scale)}" width="{_percent((end - begin) / scale)}" y="{y}" '
            f'height="7" rx="1"><title>{kind} end: {about_usd(value)}</title></rect>'
        )
    return "".join([*parts, _upright("grid", (base - least) / scale, 0, 22), "</svg>"])


def curves_svg(
    curves: Sequence[tuple[str, Sequence[float]]], limit: float | None, words: Callable[[float], str]
) -> str:
    """Chances (upwards) that a figure is no more than so much (to the right). A curve that goes beyond the picture never ends."""
    finite = [value for _, curve in curves for value in curve if math.isfinite(value)]
    limits = [] if limit is None else [limit]
    low, high = min([*finite, *limits], default=0.0), max([*finite, *limits], default=1.0)
    if limit is not None:
        # Long tails would squeeze what matters.
        high = min(high, max(limit * 2.0, low * 1.5))
    room = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    low, high = max(0.0, low - room), high + room
    span = high - low
    parts = [f'<svg class="plot" width="100%" height="{_PLOT_PX + _AXIS_PX}" role="img">']
    for share in (0.0, 0.5, 1.0):
        y = _PLOT_PX * (1 - share)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="100%" y="{y + (12 if share == 1 else -3)}" text-anchor="end">{share:.0%}</text>')
    for share in (0.08, 0.5, 0.92):
        parts.append(_word(share, words(low + span * share), _PLOT_PX + 16))
    if limit is not None:
        parts.append(_upright("limit", (limit - low) / span, 0, _PLOT_PX))
    parts.append(f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="{_PLOT_PX}">')
    for number, (name, curve) in enumerate(curves):
        points = _stairs([(value - low) / span for value in curve])
        parts.append(f'<polyline class="curve c{number}" points="{points}" vector-effect="non-scaling-stroke">')
        parts.append(f"<title>{name}</title></polyline>")
    return "".join([*parts, "</svg></svg>"])


def _stairs(places: Sequence[float]) -> str:
    """A rising line from 0 % to 100 % through the quantiles; flat to the right edge where they are not finite or outside."""
    points = [(places[0] * 100 if math.isfinite(places[0]) else 100.0, 100.0)]
    for share, place in zip(_SHARES, places, strict=True):
        if not math.isfinite(place) or place > 1:
            points.append((100.0, points[-1][1]))
            break
        points.append((place * 100, 100 * (1 - share)))
    else:
        points += [(places[-1] * 100, 0.0), (100.0, 0.0)]
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _upright(kind: str, share: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{_percent(share)}" x2="{_percent(share)}" y1="{top}" y2="{bottom}"/>'


def _word(share: float, text: str, y: float) -> str:
    anchor = "start" if share < 0.05 else "end" if share > 0.95 else "middle"
    return f'<text x="{_percent(share)}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"
