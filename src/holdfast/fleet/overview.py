"""A run as people want to see it: what was launched, where it stands, what it has cost. From the records alone.

records ──→ RunView ──→ Overview ──→ `holdfast status`, `cost`, JSON
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.fleet.money import budget_of, grant_left_s
from holdfast.fleet.phases import Phase, phase_of
from holdfast.fleet.view import LaunchView, RunView

__all__ = ["LaunchLine", "Overview", "overview_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchLine:
    """One launch. Money in millionths of a dollar, times in seconds."""

    launch: int
    phase: str
    pool: str | None
    machine: str | None
    predecessor: int | None
    asked_unix_s: float
    ended_unix_s: float | None
    why: str | None
    """What has become of it, or what it waits for."""
    step: int | None
    kept_step: int | None
    kept_work_s: int
    billed_s: int | None
    """None: it is not booked yet."""
    cost_microusd: int | None
    microusd_h: int
    on_demand_microusd_h: int
    grant_left_s: int | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    launches: tuple[LaunchLine, ...]
    cancelled: bool
    spent_microusd: int
    """By launches that are booked."""
    reserved_microusd: int
    """What those that are not can cost at most."""
    on_demand_microusd: int
    """What the booked time would have cost on demand: list price, and the time as it was, rework included."""
    by_market: tuple[tuple[str, int, int], ...]
    """Market, billed seconds, cost."""
    altered: tuple[str, ...] = ()

    @property
    def is_live(self) -> bool:
        return any(line.phase != Phase.OVER.value for line in self.launches)


def overview_of(view: RunView, now_s: int, altered: tuple[str, ...] = ()) -> Overview:
    """`now_s` on the provider's clock."""
    lines = tuple(_line(launch, now_s) for launch in view.launches)
    booked = [line for line in lines if line.cost_microusd is not None]
    spent = sum(line.cost_microusd or 0 for line in booked)
    markets: dict[str, tuple[int, int]] = {}
    for line in booked:
        if line.pool is None:
            continue
        market = line.pool.rsplit("/", 1)[-1]
        billed_s, cost = markets.get(market, (0, 0))
        markets[market] = (billed_s + (line.billed_s or 0), cost + (line.cost_microusd or 0))
    return Overview(
        launches=lines,
        cancelled=view.cancel is not None,
        spent_microusd=spent,
        reserved_microusd=budget_of(view).reserved_microusd - spent,
        on_demand_microusd=sum((line.billed_s or 0) * line.on_demand_microusd_h // 3600 for line in booked),
        by_market=tuple((market, *figures) for market, figures in sorted(markets.items())),
        altered=altered,
    )


def _line(launch: LaunchView, now_s: int) -> LaunchLine:
    intent, answer, ended, pulse = launch.intent, launch.answer, launch.ended, launch.pulse
    pool = answer.pool if answer is not None else None
    allowed = () if intent is None else intent.allowed
    list_price = next((each.on_demand_microusd_h for each in allowed if each.pool == pool), 0)
    return LaunchLine(
        launch=launch.launch,
        phase=phase_of(launch).value,
        pool=None if pool is None else pool.name,
        machine=None if answer is None else answer.machine,
        predecessor=None if intent is None else intent.predecessor,
        asked_unix_s=0.0 if intent is None else intent.created_unix_s,
        ended_unix_s=None if ended is None else ended.at_unix_s,
        why=_why(launch),
        step=None if pulse is None else pulse.step,
        kept_step=None if pulse is None else pulse.kept_step,
        kept_work_s=0 if pulse is None else pulse.kept_work_s,
        billed_s=None if ended is None else ended.billed_s,
        cost_microusd=None if ended is None else ended.cost_microusd,
        microusd_h=0 if answer is None else answer.microusd_h,
        on_demand_microusd_h=list_price,
        grant_left_s=None if ended is not None or not launch.grants else grant_left_s(launch, now_s),
        reasons=() if intent is None else intent.reasons,
    )


def _why(launch: LaunchView) -> str | None:
    if launch.answer is not None and launch.answer.outcome != "machine":
        return launch.answer.detail or launch.answer.outcome
    if launch.ended is not None:
        code = launch.released.exit_code if launch.released is not None else None
        return launch.ended.why if code is None else f"{launch.ended.why}, exit code {code}"
    if launch.commands:
        last = launch.commands[-1]
        return f"told to {'stop' if last.kind == 'stop' else 'go home'}: {'; '.join(last.reasons)}"
    if launch.notice is not None:
        left = "" if launch.notice.deadline_s is None else f", {launch.notice.deadline_s} s ahead"
        return f"notice of {launch.notice.notice}{left}"
    return None
