"""Run a command, and start it again when it was preempted or crashed. Decisions are `policy.restart`'s; the I/O is here.

    start (environment, progress page) → wait (child.Supervisor, rounds.Rounds) → evidence → policy.restart → start … or leave

The command may be anything. When it uses holdfast, it finds the progress page through HOLDFAST_CONTROL and writes its figures
into it, and the agent knows how much was committed and how much was lost.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from holdfast.agent.attempts import Attempts, RunOptions
from holdfast.agent.child import SignalInbox, Supervisor
from holdfast.agent.mirror import Mirror, MirrorOptions
from holdfast.agent.record import AgentRecord
from holdfast.agent.rounds import Outside, Rounds
from holdfast.core.clock import Clock
from holdfast.core.contract import (
    ENV_CONTROL,
    ENV_RUN,
    ENV_STAGED,
    ProgressPage,
)
from holdfast.core.errors import UsageError
from holdfast.core.events import Event, Sink
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.open import normalise_url

__all__ = ["RunOptions", "run_command"]


def run_command(
    command: Sequence[str],
    options: RunOptions,
    *,
    clock: Clock,
    sink: Sink,
    say: Callable[[str], None],
    rng: random.Random,
    environment: Mapping[str, str] | None = None,
    open_store: Callable[[str], Store] | None = None,
    outside: Outside | None = None,
) -> int:
    """Run `command` until it is done or is not worth another start; return the exit code to leave with.

    That is the last attempt's own (128 + n for death by signal n), EXIT_NO_PROGRESS, 128 + n when signal n stopped the agent
    while no command was running, or EXIT_INTERRUPTED when a second Ctrl-C killed the command; EXIT_INFRASTRUCTURE and EXIT_LIMIT as
    policy/restart.py says. `say` gets one line per attempt, `sink` the events `attempt.started`, `attempt.ended`, `command.hung`
    and `agent.stopped`. With a URL and `open_store`, the events and the command's output are kept under the URL. Owns the
    process's signal handlers meanwhile, so it must be called from the main thread. `outside`: who limits the work, and ends the
    machine afterwards. Raises UsageError when the command cannot be started.
    """
    if not command:
        raise UsageError("no command was given; write it after two dashes: holdfast run -- python train.py")
    base = dict(os.environ if environment is None else environment)
    url = options.url or base.get(ENV_RUN)
    if options.mirror is not None and (not url or open_store is None):
        raise UsageError("--mirror needs the URL of the run: holdfast run --run s3://bucket/runs/x --mirror out -- …")
    store = open_store(url) if open_store is not None and url else None
    rounds: Rounds | None = None
    mirror: Mirror | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="holdfast-") as folder, SignalInbox() as inbox:
            page = ProgressPage(Path(folder))
            base[ENV_CONTROL] = folder
            if store is not None:
                record = AgentRecord(
                    store, token=random_token()[:8], clock=clock, say=say, claimed=lambda: _claimed(page, mirror),
                    logs=options.logs, heartbeat_s=options.heartbeat_s,
                )  # fmt: skip
                sink, say = _Both(sink, record), _also_kept(say, record)
            else:
                record = None
            try:
                rounds = Rounds(
                    options.care, url=None if store is None else store.url, record=record,
                    keeps_output=store is not None and options.logs is not None, grace_s=options.grace_s,
                    leftover_grace_s=options.leftover_grace_s, page=page, folder=Path(folder), environment=base, clock=clock,
                    sink=sink, say=say, outside=outside,
                )  # fmt: skip
                if options.mirror is not None and url is not None and open_store is not None:
                    mirror = _mirror(options.mirror, url, open_store, clock, sink, say, base.get(ENV_STAGED))
                    rounds.notices.needs_s = mirror.expected_last_s
                supervisor = Supervisor(inbox, clock, options.grace_s, options.leftover_grace_s)
                agent = Attempts(
                    tuple(command), options, page, supervisor, rounds, mirror, base, clock, sink, say, rng, open_store
                )
                return agent.run()
            finally:
                if mirror is not None:
                    mirror.close()
                if rounds is not None:
                    rounds.close(unstored=None if mirror is None else mirror.unstored)
                page.close()
    finally:
        # Signals act on the agent again: nobody has to wait for what is run at the end.
        if rounds is not None:
            rounds.run_on_exit()
        if store is not None:
            store.close()


def _mirror(
    options: MirrorOptions,
    url: str,
    open_store: Callable[[str], Store],
    clock: Clock,
    sink: Sink,
    say: Callable[[str], None],
    staged: str | None,
) -> Mirror:
    return Mirror(
        options, normalise_url(url), open_store=open_store, clock=clock, tokens=random_token, sink=sink,
        say=lambda text: say(f"holdfast: {text}"),
        # The main thread, which may be waiting for the command, learns of it as of every other reason to stop.
        stop=lambda: os.kill(os.getpid(), signal.SIGTERM),
        staged=staged,
    )  # fmt: skip


def _claimed(page: ProgressPage, mirror: Mirror | None) -> int:
    if mirror is not None:
        return mirror.attempt
    try:
        progress = page.read()
    except ValueError:
        return 0
    return 0 if progress is None else progress.attempt


class _Both:
    """Two sinks as one."""

    def __init__(self, one: Sink, other: Sink) -> None:
        self._sinks = (one, other)

    def emit(self, event: Event) -> None:
        for sink in self._sinks:
            sink.emit(event)


def _also_kept(say: Callable[[str], None], record: AgentRecord) -> Callable[[str], None]:
    """The agent's own lines belong to the story that the logs tell."""

    def say_and_keep(line: str) -> None:
        say(line)
        record.keep(line.encode() + b"\n")

    return say_and_keep
