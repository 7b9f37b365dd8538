"""The options of `holdfast run` that say how to look after the command and its machine, and what they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.agent.rounds import Care
    from holdfast.core.contract import Phase

__all__ = [
    "HangAfter",
    "HangLimit",
    "Market",
    "MaxCost",
    "MaxHours",
    "NoLogs",
    "Notice",
    "OnExit",
    "Price",
    "WaitGpu",
    "WaitGpuLimit",
    "care_from",
]

NoLogs = Annotated[bool, typer.Option("--no-logs", help="Do not keep the command's output under the run's URL.")]
MaxHours = Annotated[
    float | None, typer.Option(metavar="HOURS", help="The machine works no longer than this, saving included.")
]
MaxCost = Annotated[
    float | None, typer.Option(metavar="USD", help="The machine costs no more than this; needs --price.")
]
Price = Annotated[
    float | None,
    typer.Option(metavar="USD", help="What an hour of this machine costs. Default: $HOLDFAST_PRICE_PER_HOUR."),
]
Market = Annotated[str | None, typer.Option(metavar="NAME", help="spot, on-demand or reserved; told to the command.")]
OnExit = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help='Run once at the end, whatever the end is, also when the agent is killed: "sudo shutdown -h now".',
    ),
]
HangAfter = Annotated[
    str | None,
    typer.Option(
        metavar="DURATION",
        help='Without a step (or, from a command that reports none, without output) for so long, it hangs. "never": it never does.',
        show_default="learned from the command's own steps",
    ),
]
HangLimit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PHASE=DURATION", help="The same for one phase: starting, restoring, training, evaluating, leaving."
    ),
]
Notice = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="Where to listen for word that this machine goes: auto, none, aws, gcp, azure, slurm, kubernetes, file:PATH.",
        show_default="$HOLDFAST_NOTICE, else auto",
    ),
]
WaitGpu = Annotated[bool, typer.Option("--wait-gpu", help="Start only when every GPU of the machine answers.")]
WaitGpuLimit = Annotated[
    str,
    typer.Option(metavar="DURATION", help="How long to wait for the GPUs; then the machine has failed: exit code 69."),
]


def care_from(
    *,
    max_hours: float | None,
    max_cost: float | None,
    price: float | None,
    on_exit: str | None,
    hang_after: str | None,
    hang_limits: list[str],
    wait_gpu: bool,
    wait_gpu_limit: str,
    notice: str | None,
) -> Care:
    """Raises UsageError for values that make no sense."""
    from holdfast.agent.rounds import Care
    from holdfast.agent.watchdog import Lifetime
    from holdfast.core.config import parse_duration_s
    from holdfast.policy.hang import HangLimits

    never = hang_after is not None and hang_after.strip().lower() == "never"
    always_s = parse_duration_s(hang_after) if hang_after is not None and not never else None
    declared_s = dict(_phase_limit(text) for text in hang_limits)
    return Care(
        lifetime=Lifetime(max_hours=max_hours, max_cost=max_cost, price_per_hour=price, on_exit=on_exit),
        hang=None if never else HangLimits(always_s=always_s, declared_s=declared_s),
        wait_gpu_s=parse_duration_s(wait_gpu_limit) if wait_gpu else None,
        startup_report=True,
        notice=notice,
    )


def _phase_limit(text: str) -> tuple[Phase, float]:
    from holdfast.core.config import parse_duration_s
    from holdfast.core.contract import Phase

    name, equals, duration = text.partition("=")
    phase = {known.name.lower(): known for known in Phase}.get(name.strip().lower())
    if phase is None or not equals:
        known_names = ", ".join(known.name.lower() for known in Phase)
        raise UsageError(f"--hang-limit: {text!r} is not PHASE=DURATION; phases are {known_names}")
    return phase, parse_duration_s(duration)
