"""What GCP shows of machines, as `provider.base.Machine`: instances that are there, and operations about those that are not. Pure.

A deleted instance is out of every list at once. That it was there, when it went and who ended it stands in the operations:
`insert`, `delete`, `compute.instances.preempted`. They name the instance, and so the launch and the token, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from holdfast.core.launches import Pool
from holdfast.provider.base import Machine
from holdfast.provider.gcp.words import (
    EXPIRES,
    FLEET,
    LAUNCH,
    PRICE,
    PROVIDER,
    RUN,
    TOKEN,
    Named,
    last,
    pool_of,
    read_label,
    read_name,
)

__all__ = ["ENDINGS", "Ending", "Life", "end_of", "lives_of", "machine_of", "zone_of"]

ENDINGS = r'operationType eq "insert|delete|stop|compute\.instances\..*"'
"""The filter: a regular expression of RE2, over the whole field."""

_STATES: dict[str, Literal["pending", "running", "ending", "gone"]] = {
    "PROVISIONING": "pending", "STAGING": "pending", "PENDING": "pending", "RUNNING": "running", "REPAIRING": "running",
}  # fmt: skip
Ending = Literal["provider", "owner", "itself"]
_ENDED_BY: dict[str, Ending] = {
    "compute.instances.preempted": "provider",
    "compute.instances.hostError": "provider",
    "compute.instances.terminateOnHostMaintenance": "provider",
    "compute.instances.guestTerminate": "itself",
    "delete": "owner",
    "stop": "owner",
}
_RANKS = {"provider": 0, "itself": 1, "owner": 2}


@dataclass(frozen=True, slots=True)
class Life:
    """What operations tell of one instance."""

    id: str
    zone: str
    named: Named
    created_unix_s: float | None = None
    gone_unix_s: float | None = None
    ended_by: Ending | None = None


def machine_of(instance: Mapping[str, Any], microusd_h: int | None) -> Machine | None:
    """None for what has not our labels. Without a known price, it is what the launch was allowed to cost."""
    labels = instance.get("labels") or {}
    if not {FLEET, RUN, LAUNCH, TOKEN} <= set(labels) or not labels[LAUNCH].isdigit():
        return None
    zone = last(instance["zone"])
    stopped = instance["status"] in ("TERMINATED", "STOPPED", "SUSPENDED")
    # A guest that shuts itself down leaves a stopped instance with its disk, which is billed. It does not end by itself any
    # further, so it is there, until somebody deletes it.
    state = "running" if stopped else _STATES.get(instance["status"], "ending")
    return Machine(
        id=str(instance["id"]), pool=pool_of(zone, instance), state=state, fleet=read_label(labels[FLEET]),
        run_id=read_label(labels[RUN]), launch=int(labels[LAUNCH]), token=labels[TOKEN],
        microusd_h=microusd_h if microusd_h is not None else _number(labels.get(PRICE)),
        created_unix_s=_unix_s(instance["creationTimestamp"]), ended_by="itself" if stopped else None,
        expires_unix_s=_number(labels.get(EXPIRES)),
    )  # fmt: skip


def lives_of(operations: list[Mapping[str, Any]]) -> dict[str, Life]:
    """By the instance's id. Where several things ended it, a preemption says more than the deletion that follows from it."""
    lives: dict[str, Life] = {}
    for operation in operations:
        target, kind = str(operation.get("targetLink", "")), operation.get("operationType", "")
        named = read_name(last(target))
        if named is None or "/instances/" not in target or operation.get("error"):
            continue
        id = str(operation.get("targetId", ""))
        life = lives.get(id) or Life(id, zone_of(target), named)
        at_unix_s = _unix_s(operation.get("endTime") or operation["insertTime"])
        if kind == "insert":
            life = replace(life, created_unix_s=_unix_s(operation["insertTime"]))
        elif kind in _ENDED_BY and operation.get("status") == "DONE":
            by = _ENDED_BY[kind]
            if life.ended_by is None or _RANKS[by] < _RANKS[life.ended_by]:
                life = replace(life, ended_by=by)
            life = replace(life, gone_unix_s=max(at_unix_s, life.gone_unix_s or 0.0))
        lives[id] = life
    return lives


def end_of(life: Life, fleet: str, run_id: str) -> Machine:
    """A machine that is gone, of which only operations are left: its type is not among what they tell, and its price is what it
    could cost at most.
    """
    market: Literal["spot", "on-demand"] = "spot" if life.named.spot else "on-demand"
    return Machine(
        id=life.id, pool=Pool(PROVIDER, life.zone.rpartition("-")[0], life.zone, "unknown", market), state="gone",
        fleet=fleet, run_id=run_id, launch=life.named.launch, token=life.named.token,
        microusd_h=life.named.ceiling_microusd_h, created_unix_s=life.created_unix_s or life.gone_unix_s or 0.0,
        gone_unix_s=life.gone_unix_s, ended_by=life.ended_by,
    )  # fmt: skip


def zone_of(url: str) -> str:
    """`…/zones/<zone>/…`"""
    return url.rpartition("/zones/")[2].partition("/")[0]


def _unix_s(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
