"""`holdfast plan`: is spot worth it for this job, which mix, which interval, at what cost and by when, before a machine runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.terminal import Json, opened_stores, progress_bar
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.core.jobfile import Accelerator
    from holdfast.simulate.planner.measured import Measured

__all__ = ["plan"]


def plan(
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.YAML]", help="A job file; what flags say goes before what it says.")
    ] = None,
    work: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Uninterrupted, on all machines together.")
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="GPU:N[=DURATION]", help="In each machine, and the work on it; several are compared."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Machines that work together.")] = None,
    pools: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE", help="aws, aws/us-east-1, aws/us-east-1/TYPE; several may be given."),
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="DURATION|MOMENT", help="From the start, or a moment.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="USD", help="For the whole job.")] = None,
    max_price: Annotated[str | None, typer.Option(metavar="USD", help="Of one machine, per hour.")] = None,
    on_demand_floor: Annotated[str | None, typer.Option(metavar="N|PERCENT", help="Machines always on demand.")] = None,
    checkpoint_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the whole job.")] = None,
    no_checkpoint: Annotated[bool, typer.Option("--no-checkpoint", help="The job saves nothing.")] = False,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="RATE", help='To the store, one machine: "400MiB/s".')
    ] = None,
    stall: Annotated[str | None, typer.Option(metavar="DURATION", help="What one save costs the loop.")] = None,
    save_every: Annotated[str | None, typer.Option(metavar="WHEN", help='"auto", "10 min", "500 steps".')] = None,
    step_time: Annotated[str | None, typer.Option(metavar="DURATION", help="One step.")] = None,
    changeover: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="From the order of a machine until it works: launch, set-up, restore."),
    ] = None,
    notice: Annotated[str | None, typer.Option(metavar="DURATION", help="Between the notice and the end.")] = None,
    mean_life: Annotated[str | None, typer.Option(metavar="DURATION", help="Of spot capacity for one machine.")] = None,
    mean_outage: Annotated[str | None, typer.Option(metavar="DURATION", help="Until there is capacity again.")] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Machines do not wait for each other: a sweep, preprocessing.")
    ] = False,
    task_time: Annotated[
        str | None, typer.Option(metavar="DURATION", help="One task; interrupted, it begins anew.")
    ] = None,
    serving: Annotated[bool, typer.Option("--serving", help="A server whose latency matters.")] = False,
    price_spot: Annotated[str | None, typer.Option(metavar="USD", help="Of one machine, per hour.")] = None,
    price_on_demand: Annotated[str | None, typer.Option(metavar="USD", help="Of one machine, per hour.")] = None,
    prices: Annotated[Path | None, typer.Option(metavar="FILE", help="Your price table (docs/plan.md).")] = None,
    engineering_hours: Annotated[
        float | None, typer.Option(metavar="H", min=0, help="To make the job fit for spot.")
    ] = None,
    hourly_rate: Annotated[str | None, typer.Option(metavar="USD", help="Of those hours.")] = None,
    measured: Annotated[
        str | None, typer.Option(metavar="URL|REPORT.JSON", help="A run whose figures replace assumptions.")
    ] = None,
    confidence: Annotated[
        str, typer.Option(metavar="PERCENT", help="With which deadline and budget must be met.")
    ] = "95%",
    check: Annotated[bool, typer.Option("--check", help="Leave with 1 if they are not.")] = False,
    no_sensitivity: Annotated[
        bool, typer.Option("--no-sensitivity", help="Leave out what decides: several times as fast.")
    ] = False,
    samples: Annotated[int, typer.Option(metavar="N", help="Markets that are drawn.")] = 400,
    seed: Annotated[int, typer.Option(metavar="N", help="Of their luck.")] = 1,
    json: Json = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page to FILE.")] = None,
) -> None:
    """Plan a job: is spot worth it, which mix, how often to save, what it will cost, by when, and how sure that is.

    Markets are made up from assumptions and played with the policies that decide in a fleet. All figures are orientation: the price
    table is dated, and what was not said is assumed, within ranges that the plan shows, together with which of them decide.

    \b
    Examples:
      holdfast plan job.yaml --html plan.html
      holdfast plan --work 48h --on A100:8 --deadline 60h --budget 900 --checkpoint-size 14GiB
      holdfast plan --on A100:8=48h --on H100:8=22h --pools aws --deadline 3d --engineering-hours 8 --hourly-rate 100
      holdfast plan --work 6h --on T4:1 --nodes 20 --tasks --task-time 20min
      holdfast plan job.yaml --measured s3://bucket/runs/pilot --check --confidence 90%

    \b
    JSON keys: label, name, verdict[worth, headline, because[kind, says], cautions, on_demand_usd, saved_usd, engineering_usd,
      net_usd, runs_to_pay], recommended (an option), options[hardware, mix, pools, cost_usd, finish_s (each: mean, p5, p50, p95,
      curve), p_finished, p_deadline, p_budget, p_both, saving, spot_share, preemptions, lost_s, waiting_s, keeps_deadline],
      interval[every_s, reasons], notice, break_even[life_s, preemptions_per_day, closed_form_s, likely_life_s, price_ratio],
      figures{name[likely, low, high, origin, note]}, prices[pool, on_demand_usd_h, spot_usd_h, as_of, source],
      sensitivity[base_usd, levers[name, likely, low, high]], pilot, checklist[state, what, says], not_modelled, notes, samples,
      seed, meets. Amounts that are not finite are null.
    """
    from holdfast.cli.plan_json import plain
    from holdfast.cli.plan_tables import print_plan
    from holdfast.core.clock import SystemClock
    from holdfast.core.config import parse_bytes, parse_duration_s
    from holdfast.core.jobfile import parse_deadline, parse_dollars, parse_rate, read_job
    from holdfast.simulate.planner.asking import Asked, case_of
    from holdfast.simulate.planner.plan import Sampling, make_plan
    from holdfast.simulate.planner.prices import load_prices

    def seconds(text: str | None) -> float | None:
        return None if text is None else parse_duration_s(text)

    def usd(text: str | None) -> float | None:
        return None if text is None else parse_dollars(text)

    asked = Asked(
        work_s=seconds(work), on=tuple(map(_on, on or ())), nodes=nodes, pools=tuple(pools or ()),
        deadline=None if deadline is None else parse_deadline(deadline), budget_usd=usd(budget), ceiling_usd_h=usd(max_price),
        floor=on_demand_floor, checkpoint_bytes=None if checkpoint_size is None else parse_bytes(checkpoint_size),
        no_checkpoint=no_checkpoint, bandwidth=None if bandwidth is None else parse_rate(bandwidth), stall_s=seconds(stall),
        save_every=save_every, step_s=seconds(step_time), changeover_s=seconds(changeover), notice_s=seconds(notice),
        life_s=seconds(mean_life), outage_s=seconds(mean_outage), tasks=tasks, task_s=seconds(task_time), serving=serving,
        price_spot=usd(price_spot), price_on_demand=usd(price_on_demand), engineering_hours=engineering_hours,
        hourly_rate=usd(hourly_rate), confidence=_share(confidence),
    )  # fmt: skip
    now_unix_s = SystemClock().unix_s()
    case = case_of(
        asked,
        None if job is None else read_job(job),
        load_prices(prices),
        now_unix_s=now_unix_s,
        measured=None if measured is None else _measured(measured, now_unix_s),
    )
    if check and case.deadline_s is None and case.budget_usd is None:
        raise UsageError("--check compares with a deadline or a budget; give --deadline or --budget")
    with progress_bar("playing markets", unit="steps") as on_progress:
        made = make_plan(case, Sampling(samples, seed, not no_sensitivity), on_progress)
    if html is not None:
        from holdfast.cli.plan_page import page

        try:
            html.write_text(page(made), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write the page to {str(html)!r}: {error.strerror}") from None
    if json:
        from holdfast.cli.checkpoint_tables import print_json

        print_json(plain(made))
    else:
        print_plan(made)
        if html is not None:
            typer.echo(f"Page: {html}")
    if check and not made.meets():
        raise typer.Exit(1)


def _on(text: str) -> tuple[Accelerator, float | None]:
    """Hardware and the work on it from "A100:8=48h"."""
    from holdfast.core.config import parse_duration_s
    from holdfast.core.jobfile import parse_accelerators

    name, equals, work = text.partition("=")
    found = parse_accelerators(name)
    if len(found) != 1:
        raise UsageError(f"one kind of machine per --on, not {text!r}")
    return found[0], parse_duration_s(work) if equals else None


def _share(text: str) -> float:
    """From "95%" or 0.95."""
    stripped = text.strip()
    try:
        return float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        raise UsageError(f'not a share: {text!r}; a share is written like "95%" or 0.95') from None


def _measured(name: str, now_unix_s: float) -> Measured:
    """From a report's file, or from a run's ledger."""
    from holdfast.simulate.planner.measured import measured_of, read_report, report_of_events

    if name.endswith(".json") and "://" not in name:
        return measured_of(read_report(Path(name)))
    from holdfast.ledger.read import read_events

    with opened_stores() as open_home:
        store = open_home(name)
        return measured_of(report_of_events(store.url, read_events(store), now_unix_s=now_unix_s))
