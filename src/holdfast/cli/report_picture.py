"""The pictures of `holdfast report --html`, as SVG without a view box: places along the x axis are percentages and everything else
is in pixels, so that on a phone the bars become narrower and the words stay readable.

An attempt's bar is its time from left to right. What comes one after the other (starting, restoring) stands side by side; what
alternates with every step (steps, data, stalls) is stacked: the height of a colour is its share of that stretch of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from holdfast.core.config import format_duration
from holdfast.ledger.doings import Doing
from holdfast.ledger.goodput import Account, Bucket
from holdfast.ledger.marks import NOTHING
from holdfast.ledger.timeline import Ending

__all__ = ["LANE_PX", "Slice", "nice_ticks", "slices_of", "time_axis", "timeline_svg"]

_RESOLUTION = 400
"""Slices of the whole width: finer than a phone shows, and bounded however long the run was."""
LANE_PX = 40
_BAR_PX = 20
_BAR_TOP_PX = 8
_AXIS_PX = 26
_STEPS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800)

_IN_ORDER = {
    Doing.STARTUP: Bucket.INITIALISATION,
    Doing.RESTORE: Bucket.RESTORE,
    Doing.PREPARATION: Bucket.PREPARATION,
}
_ALTERNATING = {
    Doing.STEP: Bucket.USEFUL,
    Doing.EVALUATION: Bucket.EVALUATION,
    Doing.DATA: Bucket.DATA,
    Doing.STALL: Bucket.SAVE,
}


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of an attempt's time and what it was spent on, in microseconds from the run's beginning."""

    begin_us: int
    parts: tuple[tuple[Bucket, int], ...]

    @property
    def length_us(self) -> int:
        return sum(length_us for _, length_us in self.parts)


def slices_of(account: Account, finest_us: int) -> list[Slice]:
    """An attempt's billed time in order; all slices together hold what the account's buckets hold. Pure."""
    attempt, buckets = account.attempt, account.buckets
    found: list[Slice] = []
    at_us = attempt.begin_us - attempt.boot_us - (attempt.gap_us if attempt.is_gap_billed else 0)

    def add(*parts: tuple[Bucket, int]) -> None:
        nonlocal at_us
        shown = tuple((bucket, length_us) for bucket, length_us in parts if length_us > 0)
        if shown:
            found.append(Slice(at_us, shown))
            at_us += found[-1].length_us

    own_idle_us = attempt.unexplained_us
    add((Bucket.IDLE, buckets[Bucket.IDLE] - own_idle_us))
    add((Bucket.RECOVERY, buckets[Bucket.RECOVERY]))
    if not buckets[Bucket.RECOVERY]:
        add((Bucket.INITIALISATION, attempt.boot_us if attempt.begin_us == attempt.boot_us else 0))
    excess_left_us = buckets[Bucket.STARTUP]
    before, kept_us = NOTHING, sum(account.kept_us)
    for totals in _stretches(account, finest_us):
        spent = tuple(now - then for now, then in zip(totals, before, strict=True))
        is_kept = sum(totals) <= kept_us
        before = totals
        for doing, bucket in _IN_ORDER.items():
            add((bucket if is_kept or doing is not Doing.PREPARATION else Bucket.LOST, spent[doing]))
        excess_us = min(excess_left_us, spent[Doing.STEP])
        excess_left_us -= excess_us
        add((Bucket.STARTUP, excess_us))
        parts = {doing: spent[doing] - (excess_us if doing is Doing.STEP else 0) for doing in _ALTERNATING}
        if is_kept:
            add(*((bucket, parts[doing]) for doing, bucket in _ALTERNATING.items()))
        else:
            stall_us = parts.pop(Doing.STALL)
            add((Bucket.LOST, sum(parts.values())), (Bucket.SAVE, stall_us))
    add((Bucket.IDLE, own_idle_us))
    return found


def _stretches(account: Account, finest_us: int) -> Iterator[tuple[int, ...]]:
    """Running totals at the ends of stretches of at least `finest_us`, the moment up to which work was kept among them."""
    kept = account.kept_us
    all_totals = sorted({*(mark.spent_us for mark in account.attempt.marks), kept}, key=sum)
    last_us = 0
    for index, totals in enumerate(all_totals):
        if sum(totals) - last_us >= finest_us or totals == kept or index == len(all_totals) - 1:
            last_us = sum(totals)
            yield totals


def timeline_svg(accounts: Sequence[Account]) -> str:
    """One lane per attempt over a common axis of time."""
    end_us = max(account.attempt.begin_us + account.attempt.elapsed_us for account in accounts)
    span_us = max(1, end_us)
    height_px = LANE_PX * len(accounts) + _AXIS_PX
    drawn = [
        f'<svg class="picture" width="100%" height="{height_px}" role="img" aria-label="What each attempt did, over time">'
    ]
    drawn += time_axis(span_us / 1e6, LANE_PX * len(accounts))
    for lane, account in enumerate(accounts):
        drawn += _lane(account, lane * LANE_PX, span_us)
    return "".join([*drawn, "</svg>"])


def _lane(account: Account, top_px: int, span_us: int) -> Iterator[str]:
    attempt = account.attempt
    bar_px = top_px + _BAR_TOP_PX
    if account.queue_wait_us:
        begin_us = attempt.begin_us - attempt.boot_us - account.queue_wait_us
        yield _rect("queue", begin_us, account.queue_wait_us, bar_px + _BAR_PX / 2 - 1, 2, span_us, "queue wait")
    for one in slices_of(account, span_us // _RESOLUTION):
        bottom_px = float(bar_px + _BAR_PX)
        for bucket, length_us in one.parts:
            height_px = _BAR_PX * length_us / one.length_us
            bottom_px -= height_px
            label = f"attempt {attempt.number}: {bucket.value.replace('_', ' ')} {format_duration(length_us / 1e6)}"
            yield _rect(bucket.value, one.begin_us, one.length_us, bottom_px, height_px, span_us, label)
    for save in attempt.saves:
        mark = next((mark for mark in attempt.marks if mark.is_snapshot and mark.step == save.step), None)
        if mark is not None:
            x = 100 * (attempt.begin_us + mark.elapsed_us) / span_us
            yield (
                f'<rect class="save-tick" x="{x:.3f}%" y="{bar_px + _BAR_PX + 2}" width="1.5" height="5">'
                f"<title>save of step {save.step}</title></rect>"
            )
    yield _end_mark(account, bar_px, span_us)


def _end_mark(account: Account, bar_px: int, span_us: int) -> str:
    attempt = account.attempt
    x = 100 * (attempt.begin_us + attempt.elapsed_us) / span_us
    if attempt.ending is Ending.RUNNING:
        return ""
    if attempt.ending is Ending.FINISHED:
        shape = '<path class="finished" d="M-9 -5 l3 3.5 l6 -6.5"/>'
    else:
        shape = '<path class="ended" d="M-3.5 -7.5 l7 7 m0 -7 l-7 7"/>'
    title = escape(f"attempt {attempt.number}: {attempt.ending.value}, at step {attempt.reached_step}")
    # A nested picture is placed by percentage; what is in it is in pixels.
    return f'<svg class="mark" x="{x:.3f}%" y="{bar_px}"><title>{title}</title>{shape}</svg>'


def _rect(kind: str, begin_us: float, length_us: float, y: float, height: float, span_us: int, title: str) -> str:
    return (
        f'<rect class="b-{kind}" x="{100 * begin_us / span_us:.4f}%" y="{y:.2f}" width="{100 * length_us / span_us:.4f}%" '
        f'height="{height:.2f}"><title>{escape(title)}</title></rect>'
    )


def time_axis(span_s: float, top_px: int) -> Iterator[str]:
    """Lines and words for at most six moments."""
    step_s = next((float(step) for step in _STEPS_S if span_s / step <= 5), span_s / 4)
    if span_s < 2:
        step_s = span_s / 4 or 1
    ticks = [(step_s * number / span_s, format_duration(step_s * number)) for number in _up_to(span_s / step_s)]
    yield from _ticks(ticks, top_px)


def _up_to(steps: float) -> range:
    return range(int(steps + 1e-9) + 1)


def _ticks(ticks: Sequence[tuple[float, str]], top_px: int) -> Iterator[str]:
    for share, words in ticks:
        anchor = "start" if share < 0.04 else "end" if share > 0.96 else "middle"
        yield f'<line class="grid" x1="{100 * share:.3f}%" x2="{100 * share:.3f}%" y1="0" y2="{top_px + 4}"/>'
        yield f'<text x="{100 * share:.3f}%" y="{top_px + 18}" text-anchor="{anchor}">{words}</text>'


def nice_ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between `low` and `high`."""
    span = high - low
    if span <= 0:
        return [low]
    size = 1.0
    while size * 10 <= span:
        size *= 10
    while size > span:
        size /= 10
    step = next(size * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5) if span / (size * factor) <= 5)
    first = int(low / step) - 1
    return [step * number for number in range(first, first + 10) if low - 1e-12 <= step * number <= high + 1e-12]
