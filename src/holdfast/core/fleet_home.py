"""What lies under the URL of a fleet's home: which runs it has, how they ended, and word that there is news of one.

    runs/<run_id>              launch       somebody has to look after this run: where it lives
    over/<run_id>              controller   how it ended; written before `runs/<run_id>` is removed
    inbox/<run_id>.<what>      anybody      there is news of it. The name says all; the object is empty, and nothing depends on it
    controllers/<id>           controller   the pulse of one that lives; overwritten, and removed when it leaves

What is true of a run lies under the run's own URL. From here it is only found, and found quickly: whoever loses all of this has
lost a list of URLs and some seconds.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import msgspec

__all__ = [
    "CONTROLLERS",
    "INBOX",
    "OVER",
    "RUNS",
    "ControllerPulse",
    "Enrolment",
    "News",
    "RunOver",
    "controller_key",
    "enrolment_key",
    "news_key",
    "over_key",
    "parse_news",
    "run_id_of",
    "word_news_key",
]

RUNS, OVER, INBOX, CONTROLLERS = "runs/", "over/", "inbox/", "controllers/"
_NEWS = re.compile(r"inbox/(?P<run>[A-Za-z0-9_-]{1,64})\.(?:(?P<launch>\d{8})\.\d{6}|(?P<what>enrolled|cancelled))")
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """A run of the fleet. Written once, when it is launched."""

    format: int
    nonce: str
    run_id: str
    url: str
    name: str
    provider: str
    place: str
    at_unix_s: float


class RunOver(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing is left to be done for a run."""

    format: int
    nonce: str
    run_id: str
    url: str
    name: str
    outcome: str
    exit_code: int
    reasons: tuple[str, ...]
    launches: int
    billed_s: int
    cost_microusd: int
    on_demand_microusd: int
    """What the billed time would have cost on demand."""
    at_unix_s: float


class ControllerPulse(msgspec.Struct, frozen=True, kw_only=True):
    """A controller lives."""

    format: int
    id: str
    host: str
    pid: int
    runs: int
    at_unix_s: float


class News(NamedTuple):
    """What the name of an object in the inbox says."""

    run_id: str
    what: Literal["word", "enrolled", "cancelled"]
    """`word`: a machine of the run has written one."""


def enrolment_key(run_id: str) -> str:
    return f"{RUNS}{run_id}"


def over_key(run_id: str) -> str:
    return f"{OVER}{run_id}"


def controller_key(id: str) -> str:
    return f"{CONTROLLERS}{id}"


def word_news_key(run_id: str, launch: int, part: int) -> str:
    """A machine's word with this number is written."""
    return f"{INBOX}{run_id}.{launch:08d}.{part:06d}"


def news_key(run_id: str, what: Literal["enrolled", "cancelled"]) -> str:
    return f"{INBOX}{run_id}.{what}"


def parse_news(key: str) -> News | None:
    """None for what nobody of us has put there."""
    found = _NEWS.fullmatch(key)
    if found is None:
        return None
    if found["what"] is None:
        return News(found["run"], "word")
    return News(found["run"], "enrolled" if found["what"] == "enrolled" else "cancelled")


def run_id_of(key: str) -> str | None:
    """Of a key in `runs/` or `over/`."""
    run_id = key.partition("/")[2]
    return run_id if _RUN_ID.fullmatch(run_id) else None
