"""From what the user writes (`--notice auto`, `aws,file:/run/notice`, `none`) to watchers.

`auto` is resolved by `detect`; everything else names a provider, or a file. Mistakes are found before anything is started.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.clock import Clock
from holdfast.core.config import parse_duration_s
from holdfast.core.errors import UsageError
from holdfast.notice.base import Watcher
from holdfast.notice.signals import SignalWatcher

__all__ = ["GRACE_S", "SIGNALLING", "Choice", "make_watchers", "parse_choices"]

GRACE_S = 30.0
"""What a signal or a touched file leaves unless the user says otherwise: Kubernetes' and Slurm's default."""

SIGNALLING = ("slurm", "kubernetes", "signal")
"""Who sends signals as notices. Anywhere else a signal means what the user and the command have agreed on."""

_WITH_SECONDS = ("gcp", "slurm", "kubernetes", "signal", "file")
_NAMES = ("auto", "none", "aws", "azure", *_WITH_SECONDS)
_FORMS = (
    "write auto, none, or a comma-separated list of aws, gcp, azure, slurm, kubernetes, signal and file:PATH; "
    'gcp, slurm, kubernetes and signal take the seconds that a notice leaves, as in "kubernetes:60s"'
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One provider to listen to."""

    name: str
    path: Path | None = None
    lead_s: float | None = None
    """The seconds that a notice without a time leaves, where the user knows better than the provider's default."""


def parse_choices(text: str) -> tuple[Choice, ...]:
    """Raises UsageError that says what can be written."""
    choices = tuple(_parse_choice(part.strip(), text) for part in text.split(","))
    names = [choice.name for choice in choices]
    if "none" in names and len(names) > 1:
        raise UsageError(f"--notice {text!r}: none stands alone; {_FORMS}")
    return () if names == ["none"] else choices


def _parse_choice(part: str, text: str) -> Choice:
    name, colon, argument = part.partition(":")
    if name not in _NAMES or (name == "file") != bool(colon and argument and name == "file"):
        raise UsageError(f"--notice {text!r}: {part!r} is nothing to listen to; {_FORMS}")
    if name == "file":
        return Choice(name, path=Path(argument).absolute())
    if not colon:
        return Choice(name)
    if name not in _WITH_SECONDS:
        raise UsageError(f"--notice {text!r}: {name} states its own deadlines; {_FORMS}")
    return Choice(name, lead_s=parse_duration_s(argument))


def make_watchers(
    choices: Sequence[Choice], environ: Mapping[str, str], *, clock: Clock, grace_s: float
) -> list[Watcher]:
    """Watchers for `choices`, each provider once, and one for signals in any case.

    Signals are passed on by whoever owns the handlers; not to hear one that was passed on would help nobody.
    """
    watchers: list[Watcher] = []
    seen: set[tuple[str, Path | None]] = set()
    for choice in choices:
        if (choice.name, choice.path) not in seen:
            seen.add((choice.name, choice.path))
            watchers += _watchers_of(choice, environ, clock, grace_s if choice.lead_s is None else choice.lead_s)
    if not any(isinstance(watcher, SignalWatcher) for watcher in watchers):
        watchers.append(_plain_signals(clock, grace_s))
    return watchers


def _plain_signals(clock: Clock, grace_s: float) -> SignalWatcher:
    return SignalWatcher(clock, grace_s={signal.SIGTERM: grace_s, signal.SIGUSR1: grace_s})


def _watchers_of(choice: Choice, environ: Mapping[str, str], clock: Clock, grace_s: float) -> list[Watcher]:
    match choice.name:
        case "aws":
            from holdfast.notice import aws

            return [aws.AwsWatcher(aws.endpoint(environ))]
        case "gcp":
            from holdfast.notice import gcp

            lead = {} if choice.lead_s is None else {"preemption_lead_s": choice.lead_s}
            return [*gcp.watchers(gcp.endpoint(environ), **lead)]
        case "azure":
            from holdfast.notice import azure

            return [azure.AzureWatcher(azure.endpoint(environ))]
        case "slurm":
            from holdfast.notice.slurm import SlurmTimeLimit, job_end_unix_s, slurm_signals

            end_unix_s = job_end_unix_s(environ)
            limit: list[Watcher] = [] if end_unix_s is None else [SlurmTimeLimit(end_unix_s)]
            return [slurm_signals(clock, environ, grace_s), *limit]
        case "kubernetes":
            from holdfast.notice.kubernetes import kubernetes_watcher

            return [kubernetes_watcher(clock, grace_s)]
        case "signal":
            return [_plain_signals(clock, grace_s)]
        case "file" if choice.path is not None:
            from holdfast.notice.file import FileWatcher

            return [FileWatcher(choice.path, grace_s=grace_s)]
    raise UsageError(f"{choice.name!r} is nothing to listen to; {_FORMS}")
