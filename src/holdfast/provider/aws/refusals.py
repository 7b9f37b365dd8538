"""AWS's error codes in the words in which policies decide, and what a person can do about them.

A fleet answers 200 and lists an error for each pool that it has tried; `of_fleet` makes one failure of them: the one that closes
least, because what is said against one pool is not said against the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.core.errors import LaunchFailed
from holdfast.core.failures import Failure
from holdfast.provider.aws.account import THROTTLES

__all__ = ["failure_of", "launch_failed", "of_fleet"]

_NO_CAPACITY = {
    "InsufficientCapacity",
    "InsufficientFreeAddressesInSubnet",
    "InsufficientHostCapacity",
    "InsufficientInstanceCapacity",
    "ReservationCapacityExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
}
# A person renews credentials and the launch goes on: that must not close the account for good.
_RENEWABLE = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
_NO_PERMISSION = {
    "Blocked",
    "InvalidClientTokenId",
    "MissingAuthenticationToken",
    "OptInRequired",
    "PendingVerification",
    "SignatureDoesNotMatch",
    "UnauthorizedOperation",
    "UnrecognizedClientException",
}
_BAD_REQUEST = {
    "DefaultVpcDoesNotExist",
    "IdempotentParameterMismatch",
    "OperationNotPermitted",
    "UnsupportedOperation",
    "VPCIdNotSpecified",
}
_CLOSES_LEAST = (
    Failure.NO_CAPACITY,
    Failure.QUOTA,
    Failure.THROTTLED,
    Failure.ERROR,
    Failure.NO_QUOTA,
    Failure.BAD_REQUEST,
    Failure.NO_PERMISSION,
)
_FIXES = {
    Failure.QUOTA: "wait for other machines to end, or ask for more: aws service-quotas request-service-quota-increase",
    Failure.NO_QUOTA: "ask for a quota: aws service-quotas request-service-quota-increase",
    Failure.NO_PERMISSION: "compare the rights with `controller_policy` (docs/aws.md)",
}
_THROTTLED_S = 5


def failure_of(code: str, said: str) -> Failure:
    """What kind of failure AWS reports."""
    code = code.removeprefix("Client.").removeprefix("Server.")
    if code in THROTTLES:
        return Failure.THROTTLED
    if code in _NO_CAPACITY:
        return Failure.NO_CAPACITY
    if code in _RENEWABLE:
        return Failure.ERROR
    if code in _NO_PERMISSION or code.startswith(("AuthFailure", "AccessDenied")):
        return Failure.NO_PERMISSION
    if code.endswith(("LimitExceeded", "CountExceeded", "QuotaExceeded")):
        return Failure.NO_QUOTA if re.search(r"\blimit of 0\b", said) else Failure.QUOTA
    if code in _BAD_REQUEST or code.startswith(("Invalid", "Missing", "Malformed", "Unknown")):
        return Failure.BAD_REQUEST
    return Failure.ERROR


def launch_failed(code: str, said: str, what: str) -> LaunchFailed:
    failure = failure_of(code, said)
    fix = f"; {_FIXES[failure]}" if failure in _FIXES else ""
    wait_s = _THROTTLED_S if failure is Failure.THROTTLED else 0
    return LaunchFailed(f"{what}: {code}: {said}{fix}", failure, retry_after_s=wait_s)


def of_fleet(errors: Sequence[Mapping[str, Any]]) -> LaunchFailed:
    """One failure of what a fleet says about each pool."""
    told: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        overrides = error.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        where = overrides.get("SubnetId") or overrides.get("AvailabilityZone") or ""
        pool = f"{overrides.get('InstanceType', '')} {where}".strip()
        told.setdefault((error.get("ErrorCode", ""), error.get("ErrorMessage", "")), []).append(pool)
    (code, said), _ = min(told.items(), key=lambda each: _CLOSES_LEAST.index(failure_of(*each[0])))
    every = "; ".join(f"{', '.join(filter(None, pools)) or 'fleet'}: {key[0]}" for key, pools in told.items())
    return launch_failed(code, said, f"no machine ({every})")
