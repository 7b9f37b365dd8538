"""The stand-in with guests in it: scripts that write to the console, hear of their end, shut down; lives that GCP itself ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gcp_stand_in import GcpStandIn
from gcp_words import stamp, unix_s_of, zone_of

__all__ = ["Inhabited"]

_NOTICE_S = 30.0
_BOOT_S, _RUN_S = 10.0, 40.0


@dataclass
class Inhabited(GcpStandIn):
    """What a guest does follows from its script, by its words."""

    image_has: str = "holdfast-python True\nholdfast-pip True\nholdfast-gcloud True\nholdfast-looked\n"
    ends_lives: bool = True
    """False: `maxRunDuration` is forgotten."""
    deletes_disks: bool = True
    """False: boot disks stay."""
    stops_guests: bool = True
    """False: a guest that shuts down runs on, as far as GCP knows."""
    doomed: dict[str, float] = field(default_factory=dict)
    """Instances whose preemption is simulated, and since when."""

    def compute_instances_getSerialPortOutput(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        return {"contents": self._console(self._instance(given)), "start": "0", "next": "1"}

    def compute_instances_simulateMaintenanceEvent(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        instance = self._instance(given)
        self.doomed[instance["id"]] = self.clock.unix_s()
        kind = "compute.instances.simulateMaintenanceEvent"
        return self._shown(self._begin(kind, zone_of(instance), f"instances/{instance['name']}", instance["id"], None))

    def _settle(self) -> None:
        super()._settle()
        for instance in list(self.instances.values()):
            if instance["status"] == "STOPPING":
                continue
            age_s = self.clock.unix_s() - unix_s_of(instance["creationTimestamp"])
            lifetime_s = float(instance["scheduling"]["maxRunDuration"]["seconds"])
            doomed_s = self.doomed.get(instance["id"])
            if doomed_s is not None and self.clock.unix_s() >= doomed_s + _NOTICE_S:
                self._end(instance, "compute.instances.preempted")
            elif self.ends_lives and age_s > lifetime_s:
                self._end(instance, "compute.instances.lifetimeEnded")
            elif self.stops_guests and self._has_shut_down(instance, age_s):
                instance |= {"status": "TERMINATED", "lastStopTimestamp": stamp(self.clock.unix_s())}

    def _has_shut_down(self, instance: dict[str, Any], age_s: float) -> bool:
        return "shutdown -h now" in _script(instance) and age_s > _RUN_S and instance["status"] == "RUNNING"

    def _drop(self, key: tuple[str, str], instance: dict[str, Any]) -> None:
        if self.deletes_disks:
            super()._drop(key, instance)
        elif self.instances.get(key) is instance:
            del self.instances[key]
            for disk in self.disks:
                if disk["name"] == instance["name"]:
                    disk["users"] = []

    def _console(self, instance: dict[str, Any]) -> str:
        script, age_s = _script(instance), self.clock.unix_s() - unix_s_of(instance["creationTimestamp"])
        if age_s < _BOOT_S:
            return ""
        if "holdfast-looked" in script:
            return self.image_has
        if "holdfast-watching" not in script:
            return "booted\n"
        heard = "holdfast-heard TERMINATE_ON_HOST_MAINTENANCE TRUE\n" if instance["id"] in self.doomed else ""
        return f"holdfast-watching\n{heard}"


def _script(instance: dict[str, Any]) -> str:
    return next(str(each["value"]) for each in instance["metadata"]["items"] if each["key"] == "startup-script")
