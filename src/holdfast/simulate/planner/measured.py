"""A run that was measured, put in the place of assumptions: its ledger (or `holdfast report --json`) to known figures.

What one instance shows is taken for what each would: step time, stall, bandwidth, changeover, and how often spot capacity went. The
assumed life is what was believed before: it counts as one preemption, so a pilot without any makes the figure better, not infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from holdfast.core.errors import UsageError
from holdfast.ledger.cost import Prices
from holdfast.ledger.goodput import Bucket
from holdfast.ledger.read import Recorded
from holdfast.ledger.report import AttemptReport, Report, report_of
from holdfast.ledger.timeline import Ending, timeline_of
from holdfast.policy.interval import PreemptionRate
from holdfast.simulate.planner.assumed import LAUNCH_S
from holdfast.simulate.planner.case import Known
from holdfast.simulate.planner.figures import Figure, Origin, fixed

__all__ = ["Measured", "measured_of", "read_report", "report_of_events", "with_measured"]

_TAKEN = frozenset({Ending.PREEMPTED.value, Ending.MACHINE_FAILED.value, Ending.SILENT.value})
_Z90 = 1.645


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the run showed; None where it showed nothing."""

    name: str
    attempts: int
    step_s: float | None
    stall_s: float | None
    bandwidth: float | None
    checkpoint_bytes: float | None
    restart_s: float | None
    had_new_machine: bool
    preemptions: int
    exposure_s: float
    """Billed time on spot capacity."""
    notice_to_durable_s: float | None
    restores: int
    notes: tuple[str, ...] = ()


def read_report(path: Path) -> Report:
    """What `holdfast report --json` wrote."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise UsageError(f"cannot read the report {str(path)!r}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise UsageError(f"{str(path)!r} is not what `holdfast report --json` writes: {error}") from None


def report_of_events(url: str, events: Iterable[Recorded], *, now_unix_s: float) -> Report:
    """From a run's ledger."""
    return report_of(url, timeline_of(events, now_unix_s=now_unix_s), Prices())


def measured_of(report: Report) -> Measured:
    """The figures that a plan can use."""
    total, saves, notes = report.total, report.total.saves, []
    if not report.attempts:
        raise UsageError(f"{report.url}: nothing is recorded there, so nothing was measured")
    spot = [each for each in report.attempts if each.market in ("spot", None)]
    if any(each.market is None for each in spot):
        notes.append("the market of some attempts is not recorded: taken for spot")
    taken = [each for each in spot if each.ending in _TAKEN]
    if any(each.ending == Ending.SILENT.value for each in taken):
        notes.append("attempts that died without a word count as preemptions")
    kept_steps = total.computed_steps - total.lost_steps
    sent, whole = saves.sent_bytes, saves.sent_bytes + saves.deduplicated_bytes
    waited_s = total.buckets_s.get(Bucket.RECOVERY.value, 0.0) + total.queue_wait_s
    return Measured(
        name=report.url,
        attempts=len(report.attempts),
        step_s=total.useful_s / kept_steps if kept_steps > 0 and total.useful_s > 0 else None,
        stall_s=saves.stall_median_s,
        bandwidth=sent / saves.count / saves.durable_median_s
        if saves.count and sent and saves.durable_median_s
        else None,
        checkpoint_bytes=whole / saves.count if saves.count and whole else None,
        restart_s=report.restarts.restart_s_each,
        had_new_machine=waited_s > LAUNCH_S / 2 or len({each.machine for each in report.attempts}) > 1,
        preemptions=len(taken),
        exposure_s=sum(each.figures.billed_s for each in spot),
        notice_to_durable_s=saves.notice_to_durable_s,
        restores=sum(_has_restored(each) for each in report.attempts),
        notes=tuple(notes),
    )


def _has_restored(attempt: AttemptReport) -> bool:
    return bool(attempt.start_step)


def with_measured(given: Known, measured: Measured, believed_life: Figure) -> Known:
    """Measured figures in the place of what was not given. `believed_life` is what was assumed before."""
    name = f"measured in {measured.name}"

    def put(known: Figure | None, value: float | None, note: str = name) -> Figure | None:
        is_said = known is not None and known.origin is Origin.GIVEN
        return known if is_said or value is None else fixed(value, Origin.MEASURED, note)

    changeover_s, note = measured.restart_s, name
    if changeover_s is not None and not measured.had_new_machine:
        changeover_s, note = changeover_s + LAUNCH_S, f"{name} on one machine, and 3 min (assumed) to launch another"
    life = given.life_s
    if measured.exposure_s > 0 and (life is None or life.origin is not Origin.GIVEN):
        life = _life(believed_life, measured, name)
    return replace(
        given,
        life_s=life,
        changeover_s=put(given.changeover_s, changeover_s, note),
        stall_s=put(given.stall_s, measured.stall_s),
        bandwidth=put(given.bandwidth, measured.bandwidth, f"{name}: bytes sent by time to durable, so rather low"),
        checkpoint_bytes=put(given.checkpoint_bytes, measured.checkpoint_bytes),
        step_s=put(given.step_s, measured.step_s),
        preemptions_seen=measured.preemptions,
        notice_was_heard=measured.notice_to_durable_s is not None or None,
        restores_seen=measured.restores,
    )


def _life(believed: Figure, measured: Measured, name: str) -> Figure:
    """Posterior mean and the 90 % band of a gamma distribution (Wilson and Hilferty)."""
    rate = PreemptionRate(prior_mean_s=believed.likely).observed(measured.preemptions, measured.exposure_s)
    events = 1 + measured.preemptions
    slow, fast = ((1 - 1 / (9 * events) + sign * _Z90 / (3 * math.sqrt(events))) ** 3 for sign in (-1, 1))
    mean_s = rate.mean_between_s
    count = "1 preemption" if measured.preemptions == 1 else f"{measured.preemptions} preemptions"
    return Figure(
        mean_s,
        mean_s / fast,
        mean_s / max(slow, 0.05),
        Origin.MEASURED,
        f"{count} in {measured.exposure_s / 3600:.3g} h of spot ({name}), and one of what was assumed",
    )
