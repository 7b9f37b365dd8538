"""`holdfast explain-save`: what a run would do with the seconds that are left, for figures that somebody gives, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.terminal import Json

if TYPE_CHECKING:
    from holdfast.policy.deadline import DeadlineDecision

__all__ = ["explain_save"]

_UNKNOWN = "unknown"


def explain_save(
    seconds_left: Annotated[
        str, typer.Option(metavar="DURATION", help='Until the machine goes, or "unknown".', show_default=False)
    ],
    size: Annotated[
        str,
        typer.Option(
            "--bytes", metavar="SIZE", help="What a new save has to send after deduplication.", show_default=False
        ),
    ],
    bandwidth: Annotated[
        str,
        typer.Option(
            metavar="RATE", help='Measured to the store, "400MiB/s".', show_default="unknown: a cautious assumption"
        ),
    ] = _UNKNOWN,
    bandwidth_spread: Annotated[str, typer.Option(metavar="PERCENT", help="Its relative standard deviation.")] = "20%",
    step: Annotated[int, typer.Option(metavar="N", min=0, help="The last completed step.")] = 1000,
    durable_step: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The newest checkpoint's step.", show_default="none")
    ] = None,
    step_time: Annotated[str, typer.Option(metavar="DURATION", help='One step\'s time, or "unknown".')] = "1 s",
    step_time_spread: Annotated[str, typer.Option(metavar="PERCENT", help="Its relative standard deviation.")] = "5%",
    boundary_in: Annotated[
        str, typer.Option(metavar="DURATION", help='Until the state can be copied, or "unknown" (a compile).')
    ] = "0 s",
    copy_time: Annotated[str, typer.Option(metavar="DURATION", help="How long a snapshot stops the loop.")] = "0.5 s",
    commit_latency: Annotated[
        str, typer.Option(metavar="DURATION", help="What a commit takes whatever its size.")
    ] = "1 s",
    leave_time: Annotated[
        str, typer.Option(metavar="DURATION", help="Flushing logs, and the end of the process.")
    ] = "2 s",
    margin: Annotated[
        str, typer.Option(metavar="DURATION", help="Kept in reserve: machines go a little early.")
    ] = "2 s",
    in_flight_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What a save in flight still has to send.", show_default="none in flight"),
    ] = None,
    in_flight_step: Annotated[int, typer.Option(metavar="N", min=0, help="Its step.")] = 0,
    snapshot_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What a newer snapshot in memory would send.", show_default="no snapshot"),
    ] = None,
    snapshot_step: Annotated[int, typer.Option(metavar="N", min=0, help="Its step.")] = 0,
    local_bandwidth: Annotated[
        str | None, typer.Option(metavar="RATE", help="Of a local tier that outlives the machine.", show_default="none")
    ] = None,
    insured: Annotated[bool, typer.Option("--insured", help="A save has begun since the notice came.")] = False,
    confidence: Annotated[
        str, typer.Option(metavar="PERCENT", help="How sure a plan must be to count as fitting.")
    ] = "95%",
    json: Json = False,
) -> None:
    """Explain what a run would do with the time that is left: train on, save, finish what is in flight, or leave.

    The same arithmetic decides in a run when a notice comes, and again at every step after it.

    \b
    Examples:
      holdfast explain-save --seconds-left 30s --bytes 12GiB --bandwidth 400MiB/s
      holdfast explain-save --seconds-left "2 min" --bytes 12GiB --bandwidth 400MiB/s --durable-step 400 --step-time 0.5s
      holdfast explain-save --seconds-left 30s --bytes 2GiB --boundary-in unknown --snapshot-bytes 1GiB --snapshot-step 990

    \b
    JSON keys: action, tier, durable_step, fits, probability, save_again, save_at_latest_s, abandon_in_flight, reasons.
    """
    from holdfast.core.config import parse_bytes, parse_duration_s
    from holdfast.policy.deadline import (
        DeadlineContext,
        InFlightSave,
        LocalTier,
        MemorySnapshot,
        Spread,
        decide_save,
    )

    decision = decide_save(
        DeadlineContext(
            seconds_left=_known_s(seconds_left),
            step=step,
            send_bytes=parse_bytes(size),
            durable_step=durable_step,
            in_flight=None if in_flight_bytes is None else InFlightSave(in_flight_step, parse_bytes(in_flight_bytes)),
            snapshot=None if snapshot_bytes is None else MemorySnapshot(snapshot_step, parse_bytes(snapshot_bytes)),
            bandwidth=None if bandwidth == _UNKNOWN else Spread(_rate(bandwidth), _share(bandwidth_spread)),
            commit_latency_s=parse_duration_s(commit_latency),
            snapshot_s=parse_duration_s(copy_time),
            step_time=None if (step_s := _known_s(step_time)) is None else Spread(step_s, _share(step_time_spread)),
            boundary_in_s=_known_s(boundary_in),
            leave_s=parse_duration_s(leave_time),
            margin_s=parse_duration_s(margin),
            local=None
            if local_bandwidth is None
            else LocalTier(Spread(_rate(local_bandwidth), _share(bandwidth_spread))),
            insured=insured,
            confidence=_share(confidence),
        )
    )
    _print(decision, json)


def _known_s(text: str) -> float | None:
    from holdfast.core.config import parse_duration_s

    return None if text.strip().lower() == _UNKNOWN else parse_duration_s(text)


def _rate(text: str) -> float:
    """Bytes per second from "400 MiB/s"."""
    from holdfast.core.config import parse_bytes
    from holdfast.core.errors import UsageError

    stripped = text.strip()
    if not stripped.lower().endswith("/s"):
        raise UsageError(f'not a rate: {text!r}; a rate is written like "400 MiB/s" or "1.2 GB/s"')
    return float(parse_bytes(stripped[:-2]))


def _share(text: str) -> float:
    """A share from "20%" or "0.2"."""
    from holdfast.core.errors import UsageError

    stripped = text.strip()
    try:
        return float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        raise UsageError(f'not a share: {text!r}; a share is written like "20%" or 0.2') from None


def _print(decision: DeadlineDecision, as_json: bool) -> None:
    from holdfast.core.config import format_duration

    if as_json:
        import msgspec

        fields = {
            "action": decision.action.name.lower(), "tier": decision.tier.name.lower(), "durable_step": decision.durable_step,
            "fits": decision.fits, "probability": decision.probability, "save_again": decision.save_again,
            "save_at_latest_s": decision.save_at_latest_s, "abandon_in_flight": decision.abandon_in_flight,
            "reasons": list(decision.reasons),
        }  # fmt: skip
        typer.echo(msgspec.json.encode(fields).decode())
        return
    then = ""
    if decision.save_at_latest_s is not None:
        again = "train on and save again" if decision.save_again else "the last save begins"
        then = f", {again} within {format_duration(decision.save_at_latest_s)}"
    typer.echo(f"{decision.action.value}{then}")
    kept = "nothing" if decision.durable_step is None else f"step {decision.durable_step}"
    sure = "" if decision.probability is None else f"; what is done now succeeds with {decision.probability:.0%}"
    typer.echo(f"durable in the end: {kept}{sure}")
    for reason in decision.reasons:
        typer.echo(f"  - {reason}")
