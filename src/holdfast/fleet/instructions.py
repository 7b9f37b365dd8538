"""What a controller is to do next, as data: the state machine's only output. Each is safe to carry out twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from holdfast.core.launches import Allowed, Pool
from holdfast.policy.budget_facts import Grant
from holdfast.provider.base import Machine

__all__ = ["Book", "CallCreate", "Close", "End", "Give", "Instruction", "Over", "Propose", "Tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Win this launch's number with an intent. Who loses it reads what stands there and looks anew."""

    launch: int
    allowed: tuple[Allowed, ...]
    predecessor: int | None
    policy_state: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Give:
    """Write a grant: it is reserved from here on."""

    part: int
    grant: Grant
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCreate:
    """Send the request that stands in the intent."""

    launch: int
    again: bool
    """It may have been sent before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Write the answer of a launch that was not answered, or whose answer a list has shown."""

    launch: int
    outcome: Literal["machine", "void"]
    machine: str | None = None
    pool: Pool | None = None
    microusd_h: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """A command to a launch's machine."""

    launch: int
    part: int
    kind: Literal["stop", "home"]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Ask the provider to end this machine."""

    launch: int
    machine: Machine | str
    """The machine's name, where no list has shown it yet."""
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """Write that no machine of the launch is left, and what it has cost."""

    launch: int
    machines: tuple[Machine, ...]
    """All that were ever shown; their bills are asked for. None: none has come."""
    why: Literal["preempted", "released", "stopped", "failed", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Nothing is left to be done for this run."""

    outcome: Literal["done", "failed", "cancelled", "budget", "gave up"]
    exit_code: int
    reasons: tuple[str, ...]


Instruction: TypeAlias = Propose | Give | CallCreate | Close | Tell | End | Book | Over
