"""Market policies by name: for the command line, for written states, and for whoever wants to compare them all."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from holdfast.core.errors import UsageError
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.greedy import Greedy
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.single_market import OnDemandOnly, SpotOnly
from holdfast.policy.market.uniform_progress import UniformProgress, UniformProgressAsWritten

__all__ = ["POLICIES", "policy_named"]

POLICIES: Mapping[str, MarketPolicy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (Greedy(), UniformProgress(), UniformProgressAsWritten(), OnDemandOnly(), SpotOnly(), Ours())
    }
)


def policy_named(name: str) -> MarketPolicy:
    """The policy of that name. UsageError that lists the names there are."""
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join(POLICIES)
        raise UsageError(f"there is no market policy {name!r}; there are {known}") from None
