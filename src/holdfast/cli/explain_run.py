"""`holdfast status URL --explain`: why each launch was made, and what a controller would do now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from holdfast.fleet.explain import Explanation
    from holdfast.store.base import Store

__all__ = ["explained", "plain_explanation", "print_explanation"]


def explained(store: Store) -> Explanation:
    """Nothing is written, and no rehearsal cloud is started."""
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token
    from holdfast.core.jobfile import parse_job
    from holdfast.fleet.explain import explain
    from holdfast.fleet.mandate import read_mandate, wanted_of
    from holdfast.provider.base import Instances
    from holdfast.provider.registry import instances_named

    mandate = read_mandate(store)

    def opened() -> Instances:
        return instances_named(mandate.provider, mandate.place, wanted_of(parse_job(mandate.job_text)).regions)

    return explain(mandate, store, opened, clock=SystemClock(), tokens=random_token)


def plain_explanation(found: Explanation) -> dict[str, Any]:
    from dataclasses import asdict

    plain = asdict(found)
    return plain | {
        "launched": [{"launch": launch, "reasons": reasons} for launch, reasons in found.launched],
        "would": [{"do": what, "reasons": reasons} for what, reasons in found.would],
    }


def print_explanation(found: Explanation) -> None:
    from holdfast.core.config import format_duration

    for launch, reasons in found.launched:
        typer.echo(f"launch {launch} was made because: {'; '.join(reasons)}")
    typer.echo(f"looked at: {'; '.join(found.known)}")
    if found.problem is not None:
        typer.echo(f"what a controller would do now is not known: {found.problem}")
        return
    if found.would:
        typer.echo("a controller would now")
        for what, reasons in found.would:
            typer.echo(f"  {what}{': ' if reasons else ''}{'; '.join(reasons)}")
    else:
        soon = "" if found.wait_s is None else f" for {format_duration(found.wait_s)}, then look anew"
        typer.echo(f"a controller would wait{soon}")
    if found.because:
        typer.echo(f"because: {'; '.join(found.because)}")
