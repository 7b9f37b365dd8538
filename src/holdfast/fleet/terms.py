"""What a run is launched under: what its user allows, and what its provider takes for granted. Frozen; seconds and millionths of a
dollar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.core.errors import UsageError
from holdfast.policy.budget_facts import BudgetLimits
from holdfast.policy.market.rules_facts import Rules
from holdfast.policy.retry import RetryLimits
from holdfast.provider.base import Guarantees, MachineSpec, Wanted

__all__ = ["Terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One run. Times with `_unix_s` are on the provider's clock."""

    run_id: str
    url: str
    fleet: str
    name: str
    provider: str
    guarantees: Guarantees
    wanted: Wanted
    spec: MachineSpec
    rules: Rules
    labels: Mapping[str, str] = field(default_factory=dict)
    budget: BudgetLimits
    retry: RetryLimits = field(default_factory=RetryLimits)
    policy: str = "ours"
    """Which market policy decides, where there is a deadline."""
    deadline_unix_s: int | None = None
    work_s: int | None = None
    """Time that the work takes without interruption, in all."""
    started_unix_s: int = 0
    """When the run was first launched: the start of the policy's clock."""
    changeover_s: int = 300
    """From the create call until the machine works: boot, set-up, restore."""
    tick_s: int = 60
    """How often the market policy is asked."""
    final_s: int = 120
    """What the last checkpoint and the end of the job may take after the grant's end."""
    claim_limit_s: int = 900
    """A machine that has not claimed so long after its creation is given up."""
    extras_microusd_h: int = 0
    """Disks and addresses of one machine."""
    useful_s: int = 300
    """A grant that leaves less than this after the changeover is of no use."""
    max_failures: int = 3
    """Releases in a row by an error of the job, without progress between them, after which it has failed."""
    retry_exit_codes: tuple[int, ...] = ()
    """Exit codes of the job that are started anew without being counted."""

    def __post_init__(self) -> None:
        if (self.deadline_unix_s is None) != (self.work_s is None):
            raise UsageError(
                "a deadline is kept by knowing the work that is left: give both, `deadline:` and `plan: {work: 48h}`, or neither"
            )
        if min(self.changeover_s, self.tick_s, self.final_s, self.claim_limit_s, self.useful_s) <= 0:
            raise UsageError("changeover, tick, final checkpoint and limits are longer than 0 s")

    @property
    def outside_s(self) -> int:
        """Billed before a machine's own timer starts."""
        return self.guarantees.boot_s

    @property
    def grace_s(self) -> int:
        """Billed after the grant's end, at most."""
        return self.final_s + self.guarantees.stop_s
