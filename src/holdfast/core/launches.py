"""What controller and machines know of each other: sealed records under the run's URL, each written once and never changed.

    launches/<n>/intent      controller   number n is won by put-if-absent; the token and the exact request, before the call
    launches/<n>/answer      controller   what came of it: a machine, a failure, or void (nobody waits for it any more)
    launches/<n>/ended       controller   no machine of it is left, and what it has cost
    control/reserved/<r>     controller   number r is won by put-if-absent: what a grant can cost is set aside before it is given
    control/<n>/grant-<k>    controller   a machine of this launch may work: so long, at this price at most. The longest one holds
    control/<n>/command-<k>  controller   stop, or go home
    control/cancel           anybody      the run is given up: nothing more is launched for it
    machines/<n>/holder      machine      this machine, and no other, works for the launch
    machines/<n>/word-<k>    machine      ready, claimed, noticed, withdrawn, released
    machines/<n>/pulse       machine      how far it is; the one record that is overwritten, and that nothing depends on

The role of a machine reaches its run's prefix, without `launches/` and `control/`: what it may do is said there. They are the
controller's state as well: whoever comes with an empty database reads them and goes on.

Money is whole millionths of a dollar, time whole seconds. Times of a grant run on the machine's own timer, from its boot: no wall
clock of any machine decides about money.
"""

from __future__ import annotations

import re
import uuid
from typing import Any, Literal

import msgspec

from holdfast.core.errors import UsageError
from holdfast.core.failures import Failure

__all__ = [
    "CANCEL_KEY",
    "Allowed",
    "Answer",
    "Cancel",
    "Command",
    "Ended",
    "GrantRecord",
    "Holder",
    "Intent",
    "MachineWord",
    "Pool",
    "Pulse",
    "Reservation",
    "answer_key",
    "client_token",
    "command_key",
    "ended_key",
    "grant_key",
    "holder_key",
    "intent_key",
    "parse_key",
    "pulse_key",
    "reservation_key",
    "word_key",
]


class Pool(msgspec.Struct, frozen=True, order=True):
    """Capacity of one kind in one place, on one market."""

    provider: str
    region: str
    zone: str
    instance_type: str
    market: Literal["spot", "on-demand"]

    @property
    def name(self) -> str:
        """`aws/us-east-1/us-east-1a/p4d.24xlarge/spot`."""
        return f"{self.provider}/{self.region}/{self.zone}/{self.instance_type}/{self.market}"

    @classmethod
    def named(cls, name: str) -> Pool:
        """UsageError for what is no pool's name."""
        parts = name.split("/")
        if len(parts) != 5 or not all(parts) or parts[4] not in ("spot", "on-demand"):
            raise UsageError(f"not a pool: {name!r}; written like aws/us-east-1/us-east-1a/p4d.24xlarge/spot")
        provider, region, zone, instance_type, market = parts
        return cls(provider, region, zone, instance_type, "spot" if market == "spot" else "on-demand")


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """A pool that a launch may use, and the most that its machine may cost there."""

    pool: Pool
    ceiling_microusd_h: int
    on_demand_microusd_h: int
    """What the same machine costs on demand: savings are measured against it."""


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """Before the create call: what will be asked for, exactly. Won by put-if-absent, so two controllers never share a number."""

    format: int
    launch: int
    nonce: str
    """The writer's own: it tells whether a put without a clear answer was applied."""
    run_id: str
    fleet: str
    token: str
    """The client token, by which the provider knows a repeated call; from run and number, never from an SDK."""
    allowed: tuple[Allowed, ...]
    """Best first."""
    request: dict[str, Any]
    """The provider's call, parameter by parameter. A repeated call sends this and nothing else."""
    reasons: tuple[str, ...]
    predecessor: int | None = None
    """Standby for this launch's machine: claims when that one has released, or is past its deadline and grace."""
    policy_state: str = ""
    """What the market policy remembered after it had decided on this launch, for the next controller:
    `policy.market.facts.PolicyState` as JSON."""
    created_unix_s: float = 0.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a launch. Written once; until then it is unresolved, and stays reserved."""

    format: int
    launch: int
    nonce: str
    outcome: Literal["machine", "failed", "void"]
    """`void`: given up while unknown. A machine that turns up all the same finds this, and ends itself."""
    machine: str | None = None
    pool: Pool | None = None
    microusd_h: int = 0
    failure: Failure | None = None
    detail: str = ""
    retry_after_s: int = 0
    at_unix_s: float = 0.0


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """No machine of the launch is left."""

    format: int
    launch: int
    nonce: str
    machine: str | None
    why: Literal["preempted", "released", "stopped", "failed", "never"]
    """`never`: no machine has come."""
    billed_s: int
    cost_microusd: int
    at_unix_s: float


class GrantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The right to work, and the figures from which the budget is summed up again. See `policy.budget_facts.LaunchAsk`."""

    format: int
    launch: int
    part: int
    """k: 0 before the create call, then one for each renewal."""
    nonce: str
    lifetime_s: int
    """From the boot of the machine, whole and not what is added: to hear one twice, or late, does no harm."""
    machine_microusd_h: int
    extras_microusd_h: int
    once_microusd: int
    nodes: int
    uses: tuple[tuple[str, int], ...]
    outside_s: int
    grace_s: int
    """After the lifetime, for the final checkpoint; then the watchdog ends the machine."""
    minimum_s: int
    least_s: int
    wants_s: int | None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A word of the controller. Numbered; a machine obeys each once."""

    format: int
    launch: int
    part: int
    nonce: str
    kind: Literal["stop", "home"]
    """`stop`: final checkpoint, then end. `home`: a standby that is not needed ends without having claimed."""
    reasons: tuple[str, ...]
    at_unix_s: float = 0.0


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """The run is given up. Written by whoever may write `control/`, with or without a controller."""

    format: int
    nonce: str
    now: bool
    """Machines are ended at once; else they are told to stop, and save what they have."""
    reason: str
    at_unix_s: float


CANCEL_KEY = "control/cancel"


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that works for a launch. A second one (a provider that forgot the token) finds this and ends itself."""

    format: int
    launch: int
    machine: str
    boot: str
    """Of this start of the machine: the kernel's boot id."""
    at_unix_s: float
    nonce: str = ""
    """The writer's own: it tells whether a put without a clear answer was applied."""


class MachineWord(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine has to say. Numbered by the machine, from 0."""

    format: int
    launch: int
    part: int
    machine: str
    kind: Literal["ready", "claimed", "notice", "withdrawn", "released"]
    uptime_s: int
    at_unix_s: float
    attempt: int | None = None
    """Of `claimed`: how often machines of this run have begun to work."""
    notice: str = ""
    """Of `notice`: its kind."""
    deadline_s: int | None = None
    """Of `notice`: seconds from this word."""
    exit_code: int | None = None
    """Of `released`: the agent's. 0: the run is done."""
    reasons: tuple[str, ...] = ()


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """How far a machine is."""

    format: int
    launch: int
    machine: str
    uptime_s: int
    step: int
    kept_step: int
    kept_work_s: int
    """Time that was trained here and is in a checkpoint: what this machine has taken from the work that is left."""
    at_unix_s: float


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """Money set aside for a grant. Whoever wins its number has known every one before it, so what is set aside in all never depends
    on how many controllers live. Whoever finds one without its grant gives it."""

    format: int
    number: int
    """From 1, without gaps."""
    nonce: str
    grant: GrantRecord


def intent_key(launch: int) -> str:
    return f"launches/{launch:08d}/intent"


def answer_key(launch: int) -> str:
    return f"launches/{launch:08d}/answer"


def ended_key(launch: int) -> str:
    return f"launches/{launch:08d}/ended"


def grant_key(launch: int, part: int) -> str:
    return f"control/{launch:08d}/grant-{part:06d}"


def reservation_key(number: int) -> str:
    return f"control/reserved/{number:08d}"


def command_key(launch: int, part: int) -> str:
    return f"control/{launch:08d}/command-{part:06d}"


def holder_key(launch: int) -> str:
    return f"machines/{launch:08d}/holder"


def word_key(launch: int, part: int) -> str:
    return f"machines/{launch:08d}/word-{part:06d}"


def pulse_key(launch: int) -> str:
    return f"machines/{launch:08d}/pulse"


_KEY = re.compile(
    r"(?:launches/(?P<launches>\d{8})/(?P<record>intent|answer|ended)"
    r"|control/(?P<reserved>reserved)/(?P<number>\d{8})"
    r"|control/(?P<control>\d{8})/(?P<order>grant|command)-(?P<order_part>\d{6})"
    r"|machines/(?P<machines>\d{8})/(?:(?P<said>holder|pulse)|word-(?P<word_part>\d{6})))"
)


def parse_key(key: str) -> tuple[str, int, int] | None:
    """Kind of record, launch (0: of the run) and part; None for what is none of these."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    if found["reserved"]:
        return "reserved", 0, int(found["number"])
    kind = found["record"] or found["order"] or found["said"] or "word"
    launch = int(found["launches"] or found["control"] or found["machines"])
    return kind, launch, int(found["order_part"] or found["word_part"] or 0)


_TOKENS = uuid.UUID("6f1d3c52-8f0e-4d4d-9a67-0d3b5d1f6c11")


def client_token(run_id: str, launch: int) -> str:
    """The same for the same launch, whoever asks: a UUID, as GCP wants it, and short enough for EC2 (64 characters)."""
    return str(uuid.uuid5(_TOKENS, f"{run_id}/{launch}"))
