"""`holdfast launch JOB.YAML` and `holdfast controller URL`: put a run on the cheapest capacity that will do, and keep it alive.

With `--home` a run belongs to a fleet, and one controller looks after all of them: see `cli.fleet`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.fleet import HomeUrl, IndexFile
from holdfast.cli.terminal import DryRun, Json, Yes, opened_stores
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.core.jobfile import JobFile
    from holdfast.fleet.instructions import Over
    from holdfast.fleet.mandate import Mandate
    from holdfast.fleet.starting import FirstChoice
    from holdfast.provider.base import Instances, Offer
    from holdfast.store.base import Store

__all__ = ["controller", "launch"]

Slice = Annotated[
    str,
    typer.Option(
        "--slice",
        metavar="DURATION",
        help="How far a machine's grant reaches: so long it works on when no controller lives.",
    ),
]


def launch(
    job: Annotated[Path, typer.Argument(metavar="JOB.YAML", help="What to run, on what, by when, for how much.")],
    url: Annotated[
        str | None,
        typer.Option(
            "--run", "--url", metavar="URL", help="Where the run lives; else the file's `checkpoint: {url: …}`."
        ),
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="On top of `envs:`.")] = None,
    cloud: Annotated[
        str, typer.Option("--cloud", metavar="PLACE", help="A rehearsal cloud's folder, or a GCP project.")
    ] = "",
    fleet: Annotated[
        str, typer.Option("--fleet", metavar="NAME", help="Tagged on everything that is launched.")
    ] = "default",
    home: Annotated[
        str | None,
        typer.Option(
            "--home", metavar="URL", help="Into this fleet: one `holdfast controller --home URL` looks after all of it."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Leave the controller running in the background.")
    ] = False,
    slice_: Slice = "1 h",
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Launch a run: the cheapest capacity that keeps deadline and budget, replaced when it is taken, ended when it is done.

    Prices and what is reserved are shown first. The controller is this process: while it lives, a preempted run is launched
    again. When it is stopped (Ctrl-C, a closed laptop), what runs goes on to the end of its grant, and nothing is launched any
    more; `holdfast controller URL` goes on.

    \b
    Examples:
      holdfast launch job.yaml --dry-run
      holdfast launch job.yaml -y -d
      holdfast launch job.yaml --run s3://bucket/runs/gpt-7 --env SEED=7
      holdfast launch job.yaml -y --home s3://bucket/fleet

    \b
    Exit codes: 0 the run is done; 130 it was cancelled; 78 the budget is used up; 69 no capacity that will do; else the job's own.
    JSON keys of --dry-run: run, provider, offers[pool, usd_h, on_demand_usd_h], launch[pools, reasons], reasons,
      checks[name, ok, said, fix].
    """
    from holdfast.cli.fleet import enrol
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token
    from holdfast.core.jobfile import read_job
    from holdfast.fleet.home import home_for
    from holdfast.fleet.mandate import Mandate, commission, provider_of, wanted_of
    from holdfast.fleet.mounts import check_mounts
    from holdfast.fleet.starting import first_choice
    from holdfast.provider.registry import instances_named

    read = _with_envs(read_job(job), env or [])
    text = job.read_text(encoding="utf-8")
    run_url = url or (read.checkpoint.url if read.checkpoint is not None and read.checkpoint != "none" else None)
    if run_url is None:
        raise UsageError(
            "where does the run live? Give --run URL, or `checkpoint: {url: s3://bucket/runs/name}` in the job file"
        )
    check_mounts(read, provider_of(read))
    provider = instances_named(provider_of(read), cloud, wanted_of(read).regions, run_url=run_url)
    fleet_home = "" if home is None else home_for(home, run_url)
    with opened_stores() as open_home:
        store = open_home(run_url)
        trial = Mandate(
            format=1, nonce="", run_id="", fleet=fleet, provider=provider.name, place=cloud, job_text=text,
            started_unix_s=int(provider.clock.unix_s()),
        )  # fmt: skip
        choice = first_choice(trial, store.url, provider)
        _show(choice, store.url, provider, json=json)
        if dry_run:
            return
        failed = [check for check in choice.checks if check.ok is False]
        if failed:
            raise UsageError(f"{len(failed)} of {len(choice.checks)} checks before the launch have failed, see above")
        if not yes:
            _ask()
        mandate = commission(
            read,
            text,
            store,
            provider,
            place=cloud,
            fleet=fleet,
            base=job.resolve().parent,
            clock=SystemClock(),
            tokens=random_token,
            home=fleet_home,
        )
        if fleet_home and (enrol(fleet_home, mandate, store.url, read.name or "job") or detach):
            return
        if detach:
            _detach(store.url, slice_)
            return
        _leave(_control(mandate, store, provider, slice_))


def controller(
    url: Annotated[str | None, typer.Argument(metavar="URL", help="The run.")] = None,
    home: HomeUrl = None,
    slice_: Slice = "1 h",
    index: IndexFile = None,
    threads: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="With --home: so many runs are worked on at once.")
    ] = 16,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="With --home: leave when no run of the fleet is left.")
    ] = False,
) -> None:
    """Go on with a run that was launched, or with all runs of a fleet: watch, launch again what is preempted, end what must end.

    All that is needed lies under the run's URL, and under the fleet's home. Two controllers of one run or fleet do no harm.

    \b
    Examples:
      holdfast controller s3://bucket/runs/gpt
      holdfast controller --home s3://bucket/fleet

    \b
    Exit codes: of a run as `launch`; of a fleet 0 with --until-empty when no run is left, 130 when it was stopped.
    """
    from holdfast.cli.fleet import control_fleet, one_of

    one_of(url, home)
    if home is not None:
        control_fleet(home, slice_, index, threads, until_empty=until_empty)
        return
    assert url is not None
    from holdfast.core.jobfile import parse_job
    from holdfast.fleet.mandate import read_mandate, wanted_of
    from holdfast.provider.registry import instances_named

    with opened_stores() as open_home:
        store = open_home(url)
        mandate = read_mandate(store)
        regions = wanted_of(parse_job(mandate.job_text)).regions
        provider = instances_named(mandate.provider, mandate.place, regions, run_url=store.url)
        _leave(_control(mandate, store, provider, slice_))


def _control(mandate: Mandate, store: Store, provider: Instances, slice_: str) -> Over | None:
    from holdfast.cli.fleet import sign_off
    from holdfast.core.clock import SystemClock
    from holdfast.core.config import parse_duration_s
    from holdfast.core.ids import random_token
    from holdfast.fleet.overview import overview_of
    from holdfast.fleet.shell import Pace
    from holdfast.fleet.starting import controller_of
    from holdfast.ledger.append import Ledger

    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: stopped.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    clock = SystemClock()
    ledger = Ledger(store, attempt=0, node=f"controller-{random_token()[:8]}", clock=clock)
    try:
        made = controller_of(
            mandate, store, provider, clock=clock, tokens=random_token, sink=ledger,
            say=lambda line: typer.echo(line, err=True), pace=Pace(), slice_s=int(parse_duration_s(slice_)),
        )  # fmt: skip
        over = made.run(lambda: bool(stopped))
        if over is not None and mandate.home:
            sign_off(mandate, store.url, over, overview_of(made.view, int(provider.clock.unix_s())))
    finally:
        ledger.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if over is None:
        typer.echo(
            f"holdfast: the controller has stopped. What runs goes on until its grant ends, and is not replaced when it is taken. "
            f"Go on: holdfast controller {store.url}. End it: holdfast cancel {store.url}",
            err=True,
        )
    return over


def _leave(over: Over | None) -> None:
    if over is None:
        raise typer.Exit(130)
    typer.echo(f"holdfast: {over.outcome}: {'; '.join(over.reasons)}", err=True)
    raise typer.Exit(over.exit_code)


def _with_envs(job: JobFile, given: list[str]) -> JobFile:
    import msgspec

    envs = dict(job.envs)
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"--env takes NAME=VALUE, not {each!r}")
        envs[name] = value
    return msgspec.structs.replace(job, envs=envs)


def _show(choice: FirstChoice, url: str, provider: Instances, *, json: bool) -> None:
    from holdfast.cli.checkpoint_tables import print_json, print_table

    ranked = sorted(choice.offers, key=lambda offer: offer.microusd_h)
    allowed = {each.pool: each for each in choice.launch.allowed} if choice.launch is not None else {}
    reasons = choice.outlook.reasons
    if json:
        print_json(
            {
                "run": url, "provider": provider.name,
                "offers": [
                    {"pool": each.pool.name, "usd_h": each.microusd_h / 1e6, "on_demand_usd_h": each.on_demand_microusd_h / 1e6}
                    for each in ranked
                ],
                "launch": None if choice.launch is None else {"pools": [pool.name for pool in allowed], "reasons": reasons},
                "reasons": reasons,
                "checks": [{"name": each.name, "ok": each.ok, "said": each.said, "fix": each.fix} for each in choice.checks],
            }
        )  # fmt: skip
        return
    typer.echo(f"Run {url} on {provider.name}:")
    rows = [
        [
            each.pool.name,
            f"${each.microusd_h / 1e6:,.4f}",
            _below(each),
            "may be launched now" if each.pool in allowed else "",
        ]
        for each in ranked[:20]
    ]
    print_table(["pool", ">per hour", ">below on demand", ""], rows)
    for reason in reasons:
        typer.echo(f"  {reason}")
    for check in choice.checks:
        mark = {True: "ok", False: "FAILED", None: "unknown"}[check.ok]
        typer.echo(
            f"  {mark}: {check.name}: {check.said}{f'. To mend it: {check.fix}' if check.fix and not check.ok else ''}"
        )


def _below(offer: Offer) -> str:
    listed = offer.on_demand_microusd_h
    return f"{1 - offer.microusd_h / listed:.0%}" if listed and offer.pool.market == "spot" else ""


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UsageError("this spends money and there is no terminal to ask on; add --yes")
    if not typer.confirm("Proceed?", default=True, err=True):
        typer.echo("Nothing was launched.", err=True)
        raise typer.Exit(1)


def _detach(url: str, slice_: str) -> None:
    """A session of its own, so that it outlives this terminal; not this machine's sleep."""
    folder = Path("~/.local/state/holdfast/controllers").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{os.getpid()}.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "holdfast", "controller", url, "--slice", slice_],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    typer.echo(
        f"The controller runs as process {process.pid} on this machine, and writes to {path}. When this machine sleeps or ends, "
        f"nothing replaces a preempted run. `holdfast status {url}` shows it, `holdfast cancel {url}` ends it."
    )
