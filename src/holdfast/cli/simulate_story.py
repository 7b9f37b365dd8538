"""`holdfast simulate --explain WINDOW`: one window, tick by tick, as the engine played it: what was decided, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.checkpoint_tables import print_json
from holdfast.cli.simulate_tables import NOTHING, console, long_time, money
from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.policy.market.arrays import Bools
    from holdfast.simulate.market.comparing import Ground, Request
    from holdfast.simulate.market.outcome import Outcomes
    from holdfast.simulate.market.story import Told
    from holdfast.simulate.market.workload import Workload

__all__ = ["tell_window"]

_TOLD_UNASKED = "ours"


@dataclass(frozen=True, slots=True)
class _Window:
    """One window of one ground."""

    ground: Ground
    workload: Workload
    number: int
    """From 1, as in all output."""
    of: int
    start: int

    @property
    def start_s(self) -> int:
        return self.start * self.ground.trace.tick_s


def tell_window(
    request: Request, name: str, *, told_policies: Sequence[str], every_tick: bool, as_json: bool, plot: Path | None
) -> None:
    """Lanes of all policies; the story of those that were named, or else of ours."""
    import numpy as np

    from holdfast.simulate.market.comparing import policy_on
    from holdfast.simulate.market.lane import lane_of
    from holdfast.simulate.market.story import tell

    window = _find(request, name)
    ground, workload = window.ground, window.workload
    policies = {each: policy_on(each, ground, workload, request.given) for each in request.policies}
    names = [each for each in policies if each in (told_policies or (_TOLD_UNASKED,))]
    stories = {
        each: tell(ground.trace, policies[each], workload, window.start, every_tick=every_tick) for each in names
    }
    least_usd = _least_usd(window) if request.with_optimum else None
    lanes = [lane_of(ground.trace, policy, workload, window.start) for policy in policies.values()]
    if plot is not None:
        from holdfast.cli.simulate_pictures import draw_window

        path = draw_window(ground, workload, window.number, window.start, lanes, least_usd, plot)
    if as_json:
        print_json(
            {
                "group": ground.group, "pool": ground.name, "window": window.number, "start_s": window.start_s,
                "deadline_s": workload.job.deadline_s, "optimum_usd": least_usd,
                "told": [_story_json(each, *story) for each, story in stories.items()],
            }
        )  # fmt: skip
        return
    from holdfast.cli.simulate_terminal import lane_lines

    out = console()
    out.print(_title(window, least_usd), style="bold", soft_wrap=True, markup=False)
    there: Bools = np.asarray(ground.trace.available(workload.gang)[:, window.start :].any(axis=0))
    for line in lane_lines(lanes, there, ground.trace.tick_s, workload.job.deadline_s, min(out.width, 120)):
        out.print(line, soft_wrap=True)
    for each, (outcomes, told) in stories.items():
        _print_story(out, each, outcomes, told)
    if not told_policies and len(policies) > len(names):
        out.print("\nAnother policy's story: add --policy NAME.", style="dim")
    if plot is not None:
        out.print(f"Written: {path}", soft_wrap=True, markup=False)


def _find(request: Request, name: str) -> _Window:
    """ "3", or "POOL:3" where several are played."""
    from holdfast.simulate.market.comparing import windows_of

    if len(request.workloads) > 1:
        raise UsageError("--explain tells one window of one deadline; give one --deadline")
    workload = request.workloads[0]
    pool, colon, digits = name.strip().rpartition(":")
    grounds = [ground for ground in request.grounds if not colon or ground.name == pool]
    names = ", ".join(f"{ground.name}:1" for ground in request.grounds)
    if not grounds:
        raise UsageError(f"--explain {name}: there is no pool {pool!r} here; windows are named like {names}")
    if len(grounds) > 1:
        raise UsageError(f"--explain {name}: of which pool? Name one, like {names}")
    starts = windows_of(grounds[0], workload, request.every_s, request.most_windows)
    if not (digits.isascii() and digits.isdigit()) or not 1 <= int(digits) <= len(starts):
        raise UsageError(f"--explain {name}: windows of {grounds[0].name} have the numbers 1 to {len(starts)}")
    number = int(digits)
    return _Window(grounds[0], workload, number, len(starts), int(starts[number - 1]))


def _least_usd(window: _Window) -> float:
    import numpy as np

    from holdfast.simulate.market.bounds import bounds_here

    least = bounds_here(window.ground.trace, window.workload, np.array([window.start]), lambda: None)[0]
    # Checked by the request: on-demand from the first moment would be in time.
    assert least.microusd is not None
    return least.microusd / 1e6


def _title(window: _Window, least_usd: float | None) -> str:
    job = window.workload.job
    best = "" if least_usd is None else f"; at best it costs {money(least_usd, least_usd)}"
    return (
        f"{window.ground.name}, window {window.number} of {window.of}: {format_duration(window.start_s)} into the trace: "
        f"{long_time(job.work_s)} of work in {long_time(job.deadline_s)}{best}"
    )


def _print_story(out: Console, policy: str, outcomes: Outcomes, told: Sequence[Told]) -> None:
    out.print()
    out.print(policy, style="bold")
    for at, each, was_taken in _with_losses(told):
        head = f"  {at:>14}  {_place(each)}"
        out.print(
            head + ("   (spot was taken away)" if was_taken else ""), style="red" if was_taken else "", soft_wrap=True
        )
        for reason in each.decision.reasons:
            out.print(f"  {'':>14}    {reason}", style="dim", soft_wrap=True, markup=False)
    out.print(f"  {_end(outcomes)}", soft_wrap=True, markup=False)


def _with_losses(told: Sequence[Told]) -> Iterator[tuple[str, Told, bool]]:
    """Time since the window's start, and whether spot capacity was lost just then."""
    from holdfast.policy.market.facts import Market

    before: Told | None = None
    for each in told:
        was_taken = (
            before is not None
            and before.decision.market is Market.SPOT
            and each.context.running.market is Market.NOTHING
        )
        yield _clock(each.context.now_s), each, was_taken
        before = each


def _clock(seconds: int) -> str:
    """To the second, in columns: "1 d 02:03:15"."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def _place(told: Told) -> str:
    decision, running = told.decision, told.context.running
    place = decision.market.value + (f" {decision.pool}" if decision.pool else "")
    goes_on = (running.market, running.pool) == (decision.market, decision.pool)
    return {"nothing": "wait"}.get(decision.market.value, f"{'stay on' if goes_on else 'start on'} {place}")


def _end(outcomes: Outcomes) -> str:
    finish_s, usd = int(outcomes.finish_s[0]), int(outcomes.microusd[0]) / 1e6
    late = bool(outcomes.missed[0])
    left = outcomes.waiting_s[0]
    done = (
        f"{NOTHING} not done" if finish_s < 0 else f"done after {_clock(finish_s)}{', LATE' if late else ', in time'}"
    )
    parts = [
        f"spot {money(int(outcomes.spot_microusd[0]) / 1e6, usd)} for {long_time(int(outcomes.spot_s[0]))}",
        f"on-demand {money(int(outcomes.on_demand_microusd[0]) / 1e6, usd)} for {long_time(int(outcomes.on_demand_s[0]))}",
        f"{long_time(int(left))} waited",
        f"{format_duration(int(outcomes.changeover_s[0]))} of changeovers",
        f"{int(outcomes.preemptions[0])} preemptions took back {format_duration(int(outcomes.lost_s[0]))} of work",
    ]
    return f"{done}: {money(usd, usd)} ({'; '.join(parts)})"


def _story_json(policy: str, outcomes: Outcomes, told: Sequence[Told]) -> dict[str, Any]:
    finish_s = int(outcomes.finish_s[0])
    return {
        "policy": policy,
        "cost_usd": int(outcomes.microusd[0]) / 1e6,
        "finish_s": None if finish_s < 0 else finish_s,
        "late": bool(outcomes.missed[0]),
        "decisions": [
            {
                "at_s": each.context.now_s,
                "market": each.decision.market.value,
                "pool": each.decision.pool,
                "work_left_s": each.context.work_left_s,
                "slack_s": each.context.slack_s,
                "reasons": list(each.decision.reasons),
            }
            for each in told
        ],
    }
