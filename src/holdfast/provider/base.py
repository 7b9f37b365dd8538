"""What holdfast needs of those who have machines: two interfaces, and what each promises.

    Order ──→ request ──→ the exact call, as JSON ──→ written down ──→ create ──→ Machine | LaunchFailed | OutcomeUnknown

`Instances` are clouds on which holdfast launches machines itself: AWS, GCP, and the local one for rehearsals. `Delegate`s are
schedulers that launch, requeue and restart by themselves (Slurm): to them a job is submitted once, and no restart loop of ours runs
above theirs.

A list is evidence and no truth: it may be old, and an answer may be lost. What was asked for stands in the store before it is asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from holdfast.core.clock import Clock
from holdfast.core.launches import Allowed, Pool

__all__ = [
    "Bill",
    "BootFacts",
    "Check",
    "Delegate",
    "DelegateJob",
    "DelegateStatus",
    "Guarantees",
    "Instances",
    "Leftover",
    "Machine",
    "MachineSpec",
    "Offer",
    "Order",
    "Wanted",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantees:
    """What a provider does by itself, as far as it is known. `docs/providers.md` has the table, and what was verified where."""

    honours_tokens: bool
    """The same call with the same token makes no second machine, for at least as long as a controller may be away in the call."""
    shutdown_terminates: bool
    """A machine that shuts itself down is deleted, and billed no more."""
    enforces_lifetime: bool
    """A machine is ended by the provider after `Order.lifetime_s`, whatever runs on it."""
    tags_at_birth: bool
    """A machine can be found by its tags from the first moment on."""
    list_delay_s: int
    """So long a list may not show what is there; only then is absence evidence."""
    notice_s: int
    """What a preemption is announced with, best effort; 0: nothing."""
    minimum_s: int
    """Billed at least."""
    boot_s: int
    """From the create call until the machine's own timer runs, at most as a rule; billed."""
    stop_s: int
    """From the request to end until it is billed no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootFacts:
    """How a fresh machine of this provider is made one of holdfast's; see `core.bootstrap`."""

    end_command: str
    """Ends the machine it is run on, for good: nothing of it is billed any more, or the provider sees to the rest."""
    machine_command: str = ""
    """Prints the provider's name of the machine."""
    folder: str = "/var/lib/holdfast"
    python: str = "python3"
    environment: Mapping[str, str] = field(default_factory=dict)
    """What processes on the machine need to know, and anybody may: a region, an endpoint."""
    boot_limit_s: int = 900
    """From the boot until there is a grant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the job needs of a machine; pools are looked for by it."""

    accelerators: tuple[tuple[str, int], ...] = ()
    """Any of these: name and count, as in `A100:8`. Empty: none is needed."""
    cpus: float | None = None
    memory_gib: float | None = None
    instance_types: tuple[str, ...] = ()
    """Named ones; then the rest is not looked at."""
    regions: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A pool that fits, with what is known about it now."""

    pool: Pool
    microusd_h: int
    """Price now."""
    on_demand_microusd_h: int
    available: bool | None = None
    """None: nobody can say without asking for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """The machine as data, beside its type."""

    image: str | None = None
    """The provider's name of it; None: a current one with drivers, chosen by the provider's module and written into the request."""
    disk_gib: int = 100
    disk_type: str | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    """Subnets by zone, security groups, whether it has a public address: in the provider's words."""
    role: str | None = None
    """Instance profile or service account. It reaches the run's prefix only, and cannot write `launches/` and `control/`."""
    scopes: tuple[str, ...] = ()
    local_ssd: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One machine that is wanted."""

    token: str
    fleet: str
    run_id: str
    launch: int
    allowed: tuple[Allowed, ...]
    """Best first; all on one market."""
    spec: MachineSpec
    user_data: str
    """The bootstrap script: below 16 KB, and without secrets."""
    lifetime_s: int
    """The longest that the machine may be there: for providers that end it by themselves."""
    expires_unix_s: int
    """As a tag: after this nobody can still want it."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """The user's own labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine as the provider tells of it now."""

    id: str
    pool: Pool
    state: Literal["pending", "running", "ending", "gone"]
    fleet: str
    run_id: str
    launch: int
    token: str
    microusd_h: int
    """The newest price that is known."""
    created_unix_s: float
    """Billed since."""
    gone_unix_s: float | None = None
    ended_by: Literal["provider", "owner", "itself"] | None = None
    """`provider`: a preemption. None: not known, or it has not ended."""
    expires_unix_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one machine has cost, by the provider's own prices and rules."""

    billed_s: int
    microusd: int
    final: bool
    """The machine is gone, and all prices of its life are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What is billed, or in the way, without a machine: a volume, an address, a template."""

    kind: str
    id: str
    region: str
    microusd_h: int
    expires_unix_s: int
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a preflight."""

    name: str
    ok: bool | None
    """None: it could not be found out."""
    said: str
    fix: str = ""
    """What to do; with commands where there are some."""


class Instances(Protocol):
    """Machines of one cloud.

    Thread safety: every method may be called from any thread. Failure: every error is one of `holdfast.core.errors`; `create`
    raises `LaunchFailed` when there is no machine and none will come of this request, `OutcomeUnknown` when that is not known.
    Nothing is retried inside a create call, and no token is invented.
    """

    name: str
    guarantees: Guarantees
    boot_facts: BootFacts
    clock: Clock
    """By which this provider bills: the system's, or that of a rehearsal."""

    def offers(self, wanted: Wanted) -> list[Offer]:
        """Every pool that fits, spot and on-demand, with its price now. ProviderError."""
        ...

    def extras_microusd_h(self, spec: MachineSpec, region: str) -> int:
        """The most that disks and an address of such a machine cost beside it. ProviderError where a price is not known."""
        ...

    def request(self, order: Order) -> dict[str, Any]:
        """The exact call, as JSON: pure. What it holds is all that `create` will send. UsageError for what cannot be asked for."""
        ...

    def create(self, request: Mapping[str, Any]) -> Machine:
        """Send it. The same request again returns the same machine where tokens are honoured."""
        ...

    def machines(self, fleet: str, run_id: str | None = None) -> list[Machine]:
        """What is there of this fleet, and for a while what has been. May be `guarantees.list_delay_s` old. ProviderError."""
        ...

    def bill(self, machine: Machine) -> Bill:
        """What it has cost so far, disks and addresses included: by the prices that held while it was there, per second, with the
        provider's minimum, and with what is free after a preemption. ProviderError."""
        ...

    def extend(self, machine: Machine, expires_unix_s: int) -> None:
        """Move the moment in its tags after which nobody can still want it, and in those of what belongs to it. ProviderError."""
        ...

    def terminate(self, machines: Sequence[Machine]) -> None:
        """End these; those that are gone already are no error. Returns when it is asked for, not when it is done."""
        ...

    def leftovers(self, fleet: str) -> list[Leftover]:
        """Billed things of this fleet that belong to no machine that is there."""
        ...

    def remove(self, leftovers: Sequence[Leftover]) -> None:
        """Remove these; those that are gone already are no error."""
        ...

    def preflight(self, order: Order) -> list[Check]:
        """Look whether the order can be carried out, without spending money: credentials, rights, quotas, image, network."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegateJob:
    """A job as a scheduler is told of it."""

    token: str
    """By which it is found again: a lost answer must not make two jobs."""
    name: str
    run_url: str
    command: tuple[str, ...]
    nodes: int = 1
    accelerators: tuple[tuple[str, int], ...] = ()
    cpus: float | None = None
    memory_gib: float | None = None
    time_limit_s: int | None = None
    max_requeues: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """The scheduler's own: partition, account, constraint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegateStatus:
    """One job as the scheduler tells of it."""

    id: str
    state: Literal["waiting", "running", "requeued", "done", "failed", "cancelled", "gone"]
    restarts: int
    exit_code: int | None
    said: str
    """The scheduler's own word for it."""


class Delegate(Protocol):
    """A scheduler with restarts of its own. Thread safety: every method may be called from any thread."""

    name: str

    def submit(self, job: DelegateJob) -> str:
        """Submit once; the scheduler's id, of the job that is there if this token was submitted before. ProviderError."""
        ...

    def status(self, id: str) -> DelegateStatus: ...

    def cancel(self, id: str) -> None:
        """What has ended already is no error."""
        ...

    def evidence(self, id: str) -> list[str]:
        """What the scheduler knows about why it ended or was requeued, for people."""
        ...

    def preflight(self, job: DelegateJob) -> list[Check]: ...
