"""What a budget is told and what it remembers: limits, launches, grants. Frozen, whole numbers, and nothing but facts.

Money is millionths of a dollar, time whole seconds. What a launch can cost is rounded up to a whole millionth, launch by launch.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.errors import UsageError
from holdfast.policy.written import read_state, write_state

__all__ = ["FOREVER_S", "HOUR_S", "BudgetLimits", "BudgetState", "Grant", "LaunchAsk", "LaunchRecord"]

HOUR_S = 3600
FOREVER_S = 1 << 40
Quotas = tuple[tuple[str, int], ...]
"""Names of a provider's quotas, and units of them (vCPUs, GPUs, machines)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLimits:
    """What a user allows, and how far ahead grants reach. None: no limit."""

    cap_microusd: int | None = None
    """`budget`: everything that the run may cost from its first launch on."""
    max_microusd_h: int | None = None
    """`max_price`: of one machine, per hour."""
    max_nodes: int | None = None
    """Machines at once, those included of which nobody knows yet whether they are there."""
    quotas: Quotas = ()
    """What the provider lets this account have at once."""
    slice_s: int = 3600
    """How far a grant reaches, and what a renewal adds: so long a machine works on without a controller, at most."""

    def __post_init__(self) -> None:
        if min(self.cap_microusd or 0, self.max_microusd_h or 0, self.max_nodes or 0) < 0 or self.slice_s <= 0:
            raise UsageError("budget, price ceiling and node cap are zero or more, a slice is longer than 0 s")
        _check_quotas(self.quotas)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchAsk:
    """A launch that somebody wants to make: some machines in one pool, that work together."""

    launch: int
    """The launch's number within the run; it is asked for again with the same figures, or not at all."""
    machine_microusd_h: int
    """The most that one machine can cost per hour: list price on-demand, on spot the ceiling that the provider enforces."""
    extras_microusd_h: int = 0
    """What one machine brings along: disks, addresses."""
    once_microusd: int = 0
    """Costs that do not depend on time, of the whole launch: bringing the data there."""
    nodes: int = 1
    uses: Quotas = ()
    """Of the quotas, for the whole launch."""
    outside_s: int = 0
    """Billed time before a machine's own timer starts: boot."""
    grace_s: int = 0
    """Billed time after the lifetime: the final checkpoint, and until the provider bills no more."""
    minimum_s: int = 60
    """What the provider bills at least."""
    least_s: int = 1
    """A shorter lifetime is of no use: changeover, and some work."""
    wants_s: int | None = None
    """Lifetime; None: one slice."""

    def __post_init__(self) -> None:
        figures = (self.machine_microusd_h, self.extras_microusd_h, self.once_microusd, self.outside_s)
        if min(*figures, self.grace_s, self.minimum_s) < 0 or min(self.launch, self.nodes, self.least_s) < 1:
            raise UsageError(f"a launch has a number, machines, a price and times, none of them below zero: {self}")
        if self.wants_s is not None and self.wants_s < self.least_s:
            raise UsageError(f"launch {self.launch} wants {self.wants_s} s, and at least {self.least_s} s")
        _check_quotas(self.uses)

    @property
    def microusd_h(self) -> int:
        """Of the whole launch."""
        return self.nodes * (self.machine_microusd_h + self.extras_microusd_h)

    def billed_s(self, lifetime_s: int) -> int:
        """At most, with this lifetime."""
        return max(self.outside_s + lifetime_s + self.grace_s, self.minimum_s)

    def worst_microusd(self, billed_s: int) -> int:
        """The most that so much billed time can cost."""
        return -(-self.microusd_h * billed_s // HOUR_S) + self.once_microusd

    def longest_s(self, microusd: int) -> int:
        """The longest lifetime that costs no more than this; below zero: there is none."""
        if self.worst_microusd(self.billed_s(0)) > microusd:
            return -1
        if self.microusd_h == 0:
            return FOREVER_S
        return (microusd - self.once_microusd) * HOUR_S // self.microusd_h - self.outside_s - self.grace_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a machine needs to work, as it stands in the store. Written before the launch, and anew with each renewal."""

    ask: LaunchAsk
    lifetime_s: int
    """From the start of the machine's own timer; then the final checkpoint, within `ask.grace_s`. Renewals name the whole lifetime
    and not what they add: to hear one twice, or late, does no harm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """What is known of one launch."""

    grant: Grant
    seen: bool = False
    """A machine has been found. Until then nobody knows whether there is one: what it could cost stays reserved all the same."""
    metered_s: int = 0
    """Billed time up to which the cost is known."""
    metered_microusd: int = 0
    """What does not depend on time is in it."""
    final_microusd: int | None = None
    """What it has cost in all, once no machine of it is left."""

    @property
    def reserved_microusd(self) -> int:
        """The most that it can have cost by its end: what is known of it, and the ceiling for the rest."""
        if self.final_microusd is not None:
            return self.final_microusd
        ask = self.grant.ask
        billed_s = ask.billed_s(self.grant.lifetime_s)
        worst = ask.worst_microusd(billed_s)
        if not self.metered_s:
            return worst
        rest = self.metered_microusd + -(-ask.microusd_h * max(0, billed_s - self.metered_s) // HOUR_S)
        # Two roundings must not make more of it than one; a bill above the ceiling must.
        above = self.metered_microusd > ask.worst_microusd(self.metered_s) or self.metered_s > billed_s
        return rest if above else min(rest, worst)

    @property
    def is_open(self) -> bool:
        return self.final_microusd is None


@dataclass(frozen=True, slots=True)
class BudgetState:
    """Every launch of the run, by its number. What the store holds can be put in again at any time (`budget.recall`)."""

    launches: tuple[LaunchRecord, ...] = ()

    def of(self, launch: int) -> LaunchRecord | None:
        return next((record for record in self.launches if record.grant.ask.launch == launch), None)

    def with_record(self, record: LaunchRecord) -> BudgetState:
        launch = record.grant.ask.launch
        others = [each for each in self.launches if each.grant.ask.launch != launch]
        return BudgetState(tuple(sorted([*others, record], key=lambda each: each.grant.ask.launch)))

    @property
    def reserved_microusd(self) -> int:
        """What has been spent and what can still be: running, pending, unresolved, with final checkpoints and stops."""
        return sum(record.reserved_microusd for record in self.launches)

    @property
    def nodes(self) -> int:
        return sum(record.grant.ask.nodes for record in self.launches if record.is_open)

    def used(self, quota: str) -> int:
        asks = (record.grant.ask for record in self.launches if record.is_open)
        return sum(units for ask in asks for name, units in ask.uses if name == quota)

    def to_json(self) -> str:
        return write_state(self)

    @classmethod
    def from_json(cls, text: str) -> BudgetState:
        return read_state("a budget's state", text, cls)


def _check_quotas(quotas: Quotas) -> None:
    names = [name for name, _ in quotas]
    if len(set(names)) < len(names) or any(type(units) is not int or units < 0 for _, units in quotas):
        raise UsageError(f"a quota is named once, with zero units or more: {quotas}")
