"""Moving the moment after which nobody can still want a machine: in its labels, and in those of its disk.

GCP sets all labels of a thing at once, and only on top of those that the caller has read (their fingerprint): whoever is quicker
wins, and the other reads again.
"""

from __future__ import annotations

from typing import Any

from holdfast.core.errors import ProviderError
from holdfast.provider.base import Machine
from holdfast.provider.gcp.calls import Calls, Refused
from holdfast.provider.gcp.words import EXPIRES

__all__ = ["extend"]

_TRIES = 4


def extend(calls: Calls, project: str, machine: Machine, expires_unix_s: int) -> None:
    """What is gone already has no moment to move. Raises what `Calls.call` does, and ProviderError."""
    zone = machine.pool.zone
    name = _move(
        calls, "instances", {"project": project, "zone": zone, "instance": machine.id}, "instance", expires_unix_s
    )
    if name is not None:
        # The boot disk is named like its machine.
        _move(calls, "disks", {"project": project, "zone": zone, "disk": name}, "resource", expires_unix_s)


def _move(calls: Calls, kind: str, at: dict[str, Any], named: str, expires_unix_s: int) -> str | None:
    """The thing's name; None: it is not there. `named`: what `setLabels` calls the thing."""
    place = {"project": at["project"], "zone": at["zone"]}
    for _ in range(_TRIES):
        try:
            found = calls.call("compute", f"{kind}.get", **at)
            body = {
                "labels": (found.get("labels") or {}) | {EXPIRES: str(expires_unix_s)},
                "labelFingerprint": found["labelFingerprint"],
            }
            calls.call("compute", f"{kind}.setLabels", **place, **{named: found["name"]}, body=body)
        except Refused as error:
            if error.refusal.is_absence:
                return None
            if error.refusal.status != 412:
                raise
            continue
        return str(found["name"])
    raise ProviderError(f"GCP: the labels of {kind} {at} are changed by somebody else all the time; ask again")
