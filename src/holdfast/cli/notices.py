"""`holdfast notices`: hear what this machine is told, and rehearse it with a metadata server of our own."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.core.config import format_duration, parse_duration_s

if TYPE_CHECKING:
    from holdfast.core.events import Event
    from holdfast.notice.base import Notice
    from holdfast.testing.metadata import MetadataServer

__all__ = ["notices_app"]

notices_app = typer.Typer(
    help="Hear preemption notices, and rehearse them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Cloud(StrEnum):
    aws = "aws"
    gcp = "gcp"
    azure = "azure"


@notices_app.command("watch")
def watch_command(
    notice: Annotated[
        str,
        typer.Option(
            "--notice",
            metavar="SOURCES",
            help="auto, or a comma-separated list of aws, gcp, azure, slurm, kubernetes, file:PATH.",
        ),
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="Stop after so long.", show_default="until Ctrl-C")
    ] = None,
) -> None:
    """Print the notices that this machine gets, as they come.

    What is listened to, and what is wrong with a source, goes to standard error.

    \b
    Examples:
      holdfast notices watch
      holdfast notices watch --notice aws,file:/run/going --json --for "10 min"

    \b
    JSON keys: kind (preemption, rebalance, maintenance, termination, withdrawn), deadline_unix_s (null: advice), left_s, source,
      id, assumed (true: the provider did not say when), heard_unix_s, evidence.
    """
    import threading

    from holdfast.core.clock import SystemClock
    from holdfast.notice.listen import listen

    clock = SystemClock()
    limit_s = None if for_ is None else parse_duration_s(for_)

    def told(heard: Notice) -> None:
        _print(_json_line(heard, clock.unix_s()) if json else _line(heard, clock.unix_s()))

    listener = listen(notice, clock=clock, sink=_TroubleOnStderr(), on_notice=told)
    try:
        with suppress(KeyboardInterrupt):
            threading.Event().wait(limit_s)
    finally:
        listener.close()


@notices_app.command("fake")
def fake_command(
    cloud: Annotated[_Cloud, typer.Option(help="Whose metadata server.")],
    after: Annotated[
        str, typer.Option(metavar="DURATION", help="When it happens, counted from the first request of a client.")
    ] = "10 s",
    lead: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="From the notice to the deadline.", show_default="the cloud's own"),
    ] = None,
    what: Annotated[str, typer.Option(metavar="VERB", help="What happens; a wrong word lists what can.")] = "preempt",
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON list of what happens when, instead of one thing.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 0,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="Stop after so long.", show_default="until Ctrl-C")
    ] = None,
) -> None:
    """Run a metadata server that behaves like a cloud's, and announce a preemption.

    Prints the lines that make a shell's processes hear it. Only notices come from it: on a real machine, other programs that
    follow the same variable (boto3, Google's libraries) find no credentials there; give those another way for the rehearsal.

    \b
    Examples:
      holdfast notices fake --cloud aws --after "1 min" --lead "120 s"
      holdfast notices fake --cloud azure --timeline bad-day.json
    bad-day.json:
      [{"at": "10 s", "do": "preempt", "lead": "60 s"}, {"at": "15 s", "do": "stall", "for": "5 s"},
       {"at": "30 s", "do": "withdraw"}]
    """
    from holdfast.testing.metadata import Step, metadata_server, read_timeline

    lead_s = None if lead is None else parse_duration_s(lead)
    steps = read_timeline(timeline) if timeline else [Step(at_s=parse_duration_s(after), do=what, lead_s=lead_s)]
    limit_s = None if for_ is None else parse_duration_s(for_)
    with metadata_server(cloud.value, timeline=steps, address=("127.0.0.1", port), from_first_request=True) as server:
        for name, value in server.environment.items():
            _print(f"export {name}={value}")
        _say(
            "in another shell: those lines, then the training. The timeline begins when it first asks. Ctrl-C ends the rehearsal."
        )
        with suppress(KeyboardInterrupt):
            _narrate(server, limit_s)


def _narrate(server: MetadataServer, limit_s: float | None) -> None:
    """Say what happens, until it is over."""
    from holdfast.core.clock import SystemClock

    clock = SystemClock()
    end_s = None if limit_s is None else clock.monotonic_s() + limit_s
    told = 0
    listening = False
    while end_s is None or clock.monotonic_s() < end_s:
        server.advance()
        if server.asked and not listening:
            listening = True
            _say("somebody listens")
        for step in server.happened[told:]:
            lead = "" if step.lead_s is None else f", {format_duration(step.lead_s)} ahead"
            _say(f"{_clock_time(clock.unix_s())} {step.do}{lead}")
        told = len(server.happened)
        clock.sleep(0.1)


class _TroubleOnStderr:
    """Shows what concerns the listening itself; notices are printed where they are told."""

    def emit(self, event: Event) -> None:
        if event.name == "notice.listening":
            _say(f"listening to {', '.join(event.fields['to'])}")
        elif event.name == "notice.trouble":
            times = event.fields["times"]
            _say(f"{event.fields['source']}: {event.fields['what']}{f' ({times} times)' if times > 1 else ''}")


def _line(heard: Notice, now_unix_s: float) -> str:
    left_s = heard.left_s(now_unix_s)
    if heard.kind == "withdrawn":
        return f"{_clock_time(now_unix_s)} withdrawn: {heard.evidence['was']} from {heard.source} ({heard.evidence['reason']})"
    if left_s is None or heard.deadline_unix_s is None:
        return f"{_clock_time(now_unix_s)} {heard.kind} from {heard.source}: advice, no deadline"
    about = "about " if heard.assumed else ""
    left = f"{about}{format_duration(left_s)} left, until {_clock_time(heard.deadline_unix_s)}"
    return f"{_clock_time(now_unix_s)} {heard.kind} from {heard.source}: {left}"


def _json_line(heard: Notice, now_unix_s: float) -> str:
    import msgspec

    fields = {
        "kind": heard.kind.value, "deadline_unix_s": heard.deadline_unix_s, "left_s": heard.left_s(now_unix_s),
        "source": heard.source, "id": heard.id, "assumed": heard.assumed, "heard_unix_s": heard.heard_unix_s,
        "evidence": heard.evidence,
    }  # fmt: skip
    return msgspec.json.encode(fields).decode()


def _clock_time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%H:%M:%S")


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
