"""`holdfast notify`: a shutdown script, or a watcher of one's own, says that the machine goes, and waits until all is kept."""

from __future__ import annotations

import sys
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.agent.notify import Fate
    from holdfast.agent.registry import Registered
    from holdfast.core.clock import Clock
    from holdfast.core.contract import NoticeWord

__all__ = ["notify"]


class _Kind(StrEnum):
    preemption = "preemption"
    termination = "termination"
    maintenance = "maintenance"
    rebalance = "rebalance"


def notify(
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help='When the machine goes: in so long ("25s"), or at a time (2027-05-01T12:00:00Z, Unix seconds).',
        ),
    ] = None,
    kind: Annotated[
        _Kind, typer.Option(help="What is going to happen; rebalance is advice, without a deadline.")
    ] = _Kind.preemption,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who says so, for the records; one event for each name.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Return when everything is kept, or as soon as it has been heard.")
    ] = True,
    run: Annotated[
        str | None, typer.Option("--run", "--url", metavar="URL", help="Only agents of this run.", show_default="all")
    ] = None,
    pid: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the agent with this process id.", show_default="all")
    ] = None,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="The machine stays: take back what the same source has said.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:
    """Tell every agent (`holdfast run`) on this machine that the machine goes, and wait until everything is kept.

    Agents take it like a notice of a cloud's: they train on while there is time, save at the latest safe moment, and end. Waiting
    ends at the deadline at the latest. Agents of this user are told; for root, those of all users.

    \b
    Examples:
      holdfast notify --deadline 25s
      holdfast notify --deadline 2027-05-01T12:00:00Z --kind maintenance --no-wait
      holdfast notify --withdraw
      holdfast notify --deadline "100 s" --run s3://bucket/runs/gpt --json

    \b
    Exit codes:
      0    everything is kept (with --no-wait: every agent has heard it); also when no agent is there
      1    the deadline came first, or something was lost
      2    a wrong argument
      69   an agent that is there could not be told

    \b
    JSON keys: deadline_unix_s, exit_code, agents; of each agent pid, uid, run, outcome (kept, lost, ready, heard, withdrawn, ended,
      unreachable), step (the newest that is durable, or null), lost (what, or why, in words).
    """
    import os

    from holdfast.agent.notify import exit_code, notify_agents
    from holdfast.agent.registry import find_agents
    from holdfast.core.clock import SystemClock

    clock = SystemClock()
    word = _word(deadline, kind, source, clock, withdraw=withdraw)
    follows = wait and word.deadline_unix_s is not None
    agents, others = _chosen(find_agents(os.environ), run, pid)
    if not agents and not json:
        _print(_nobody(others))
    fates = notify_agents(
        agents,
        word,
        wait=follows,
        clock=clock,
        still_there=lambda agent: agent in find_agents(os.environ),
        changed=lambda fate: None if json else _print(_line(fate)),
    )
    code = exit_code(fates, waited=follows)
    if json:
        _print(_document(word, fates, code))
    elif follows and any(fate.outcome in ("heard", "ready") for fate in fates):
        _print("the deadline has passed, and not everything is kept")
    raise typer.Exit(code)


def _word(deadline: str | None, kind: _Kind, source: str | None, clock: Clock, *, withdraw: bool) -> NoticeWord:
    from holdfast.core.contract import NoticeWord

    if withdraw and deadline is not None:
        raise UsageError("--withdraw says that the machine stays, --deadline when it goes: give one of them")
    if kind is _Kind.rebalance and deadline is not None:
        raise UsageError("--kind rebalance is advice, which has no deadline: leave one of them out")
    if not withdraw and deadline is None and kind is not _Kind.rebalance:
        raise UsageError("say when the machine goes: --deadline 25s, or --withdraw when it stays after all")
    name = "notify" if source is None else f"notify:{source}"
    now_s = clock.unix_s()
    return NoticeWord(
        kind="withdrawn" if withdraw else kind.value,
        deadline_unix_s=None if deadline is None else _moment(deadline, now_s),
        source=name,
        id=name,
        heard_unix_s=now_s,
    )


def _moment(text: str, now_unix_s: float) -> float:
    from holdfast.core.config import parse_duration_s
    from holdfast.notice.times import parse_time_unix_s

    moment = parse_time_unix_s(text)
    if moment is not None:
        return moment
    try:
        return now_unix_s + parse_duration_s(text)
    except UsageError as error:
        raise UsageError(
            f"--deadline: neither a time (2027-05-01T12:00:00Z, Unix seconds) nor a duration: {error}"
        ) from None


def _chosen(found: list[Registered], run: str | None, pid: int | None) -> tuple[list[Registered], list[Registered]]:
    """Those who are meant, and the others."""
    from holdfast.store.open import normalise_url

    url = None if run is None else normalise_url(run)
    meant = [
        agent
        for agent in found
        if (pid is None or agent.pid == pid)
        and (url is None or (agent.run is not None and normalise_url(agent.run) == url))
    ]
    return meant, [agent for agent in found if agent not in meant]


def _nobody(others: list[Registered]) -> str:
    import os

    whose = "" if os.geteuid() == 0 else " of yours"
    if not others:
        return f"no agent{whose} runs on this machine: nothing has to be kept"
    return f"no such agent{whose} runs on this machine; there are others: {', '.join(map(_name, others))}"


def _name(agent: Registered) -> str:
    return f"agent {agent.pid}" + (f" of {agent.run}" if agent.run else "")


def _line(fate: Fate) -> str:
    step = "" if fate.step is None else f": step {fate.step} is durable"
    said = {
        "heard": "has heard it",
        "ready": f"has saved{step}",
        "kept": f"has kept everything{step}",
        "lost": f"has ended, and NOT everything is kept{step}",
        "withdrawn": "goes on: the notice has been withdrawn",
        "ended": "had come to its end before",
        "unreachable": "could NOT be told",
    }
    why = f" ({'; '.join(fate.lost)})" if fate.lost else ""
    return f"{_name(fate.agent)} {said[fate.outcome or 'unreachable']}{why}"


def _document(word: NoticeWord, fates: list[Fate], code: int) -> str:
    import msgspec

    agents = [
        {
            "pid": fate.agent.pid, "uid": fate.agent.uid, "run": fate.agent.run, "outcome": fate.outcome, "step": fate.step,
            "lost": fate.lost,
        }
        for fate in fates
    ]  # fmt: skip
    document = {"deadline_unix_s": word.deadline_unix_s, "exit_code": code, "agents": agents}
    return msgspec.json.encode(document).decode()


def _print(line: str) -> None:
    # A console that has gone away must not end the waiting.
    with suppress(OSError, ValueError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
