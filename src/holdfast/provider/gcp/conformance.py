"""Does GCP keep what is promised in its name? A script for a real project: a few small machines for minutes, within a stated cap.

    the worst that it can cost, before anything is asked for → preflight → born, repeated, listed, labelled, extended → ended by its
    owner → shuts itself down → is preempted (a maintenance event that GCP simulates) → ends by maxRunDuration → nothing left

It launches four machines, or up to seven where GCP does what it should not; GCP ends each after twenty minutes whatever becomes of
this process. What a stand-in cannot show is shown here: request ids, labels at birth, how late lists are, what ends a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from holdfast.core.errors import HoldfastError
from holdfast.provider.base import Machine, MachineSpec, Offer, Wanted
from holdfast.provider.conformance import POLL_S, Finding, Script, carry_out, cheapest, dollars, within
from holdfast.provider.gcp.calls import NotSent, Refused, Unanswered
from holdfast.provider.gcp.instances import GcpInstances
from holdfast.provider.gcp.words import EXPIRES, FLEET, label_value, last

__all__ = ["MORE_PERMISSIONS", "conformance", "plan"]

MORE_PERMISSIONS = ("compute.instances.getSerialPortOutput", "compute.instances.simulateMaintenanceEvent")
"""That this script needs beside the controller's."""
_FAILURES = (Refused, Unanswered, NotSent, HoldfastError)
_SHORT_S = 120
_BOOT_S = 300.0
_WAIT = "#!/bin/sh\nsleep 3600\n"
_LOOK = """#!/bin/sh
{
  python3 -c 'import sys; print("holdfast-python", sys.version_info >= (3, 11))'
  python3 -m pip --version >/dev/null 2>&1 && echo holdfast-pip True
  { command -v gcloud || command -v gsutil; } >/dev/null && echo holdfast-gcloud True
  echo holdfast-looked
} > /dev/console
sleep 20
shutdown -h now
"""
_WATCH = """#!/bin/sh
ask() { curl -fsS -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/$1"; }
echo holdfast-watching > /dev/console
while :; do
  event=$(ask maintenance-event); preempted=$(ask preempted)
  case "$event $preempted" in 'NONE FALSE'|' ') ;; *) echo "holdfast-heard $event $preempted" > /dev/console ;; esac
  sleep 1
done
"""


def plan(
    cloud: GcpInstances, *, fleet: str, cap_microusd: int, wanted: Wanted, spec: MachineSpec, market: str = "spot"
) -> Script:
    """`fleet` must be a new name. UsageError when the cap is too small or nothing fits. Nothing is made yet."""
    script = _GcpScript(cloud, fleet, cheapest(cloud, wanted, market), spec)
    within(script, cap_microusd)
    return script


def conformance(
    cloud: GcpInstances,
    *,
    fleet: str,
    cap_microusd: int,
    wanted: Wanted,
    spec: MachineSpec,
    market: str = "spot",
    say: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """`plan`, and carry it out."""
    script = plan(cloud, fleet=fleet, cap_microusd=cap_microusd, wanted=wanted, spec=spec, market=market)
    return carry_out(script, say)


class _GcpScript(Script):
    machines_at_most = 7
    """Four, and three more where calls make what they must not."""
    longest_s = 1200

    def __init__(self, cloud: GcpInstances, fleet: str, offer: Offer, spec: MachineSpec) -> None:
        # Spot has no ceiling at GCP; it is never dearer than on demand.
        super().__init__(cloud, fleet, offer, spec, max(offer.microusd_h, offer.on_demand_microusd_h))
        self._gcp, self._zone = cloud, offer.pool.zone

    def findings(self) -> Iterator[Finding]:
        order = self.order(1, _WAIT)
        checks = list(self.preflight(order))
        yield from checks
        if any(each.ok is False for each in checks):
            return
        request = self.cloud.request(order)
        began_s = self.cloud.clock.monotonic_s()
        try:
            machine = self.create(request)
        except HoldfastError as error:
            yield Finding("a machine is made", False, str(error))
            return
        after_s = self.cloud.clock.monotonic_s() - began_s
        yield Finding("a machine is made", True, f"{machine.id} in {machine.pool.name}, answered after {after_s:.0f} s")
        yield self.listed(machine, began_s)
        yield self._again(request, machine)
        yield from self._tokens(request, machine)
        yield self._operation(request)
        yield from self._born(request, machine)
        yield from self._extended(request, machine)
        yield from self._owners_end(request, machine)
        yield from self._shutdown()
        if self.offer.pool.market == "spot":
            yield from self._preempted()
        yield from self._lifetime()

    # ---- birth

    def shows(self, machine: Machine) -> bool:
        """The list alone: `GcpInstances.machines` asks for what it leaves out."""
        return any(str(each["id"]) == machine.id for each in self._all("instances"))

    def _again(self, request: Mapping[str, Any], machine: Machine) -> Finding:
        again = self.create(request)
        return Finding("the same request again", again.id == machine.id, f"{again.id} after {machine.id}")

    def _tokens(self, request: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
        """What GCP itself says, without our looking first: to the same insert, to its request id with another machine, and to its
        name with another request id."""
        body, other = request["body"], f"{request['body']['name']}x"
        boot = {**body["disks"][0], "initializeParams": {**body["disks"][0]["initializeParams"], "diskName": other}}
        renamed = {**body, "name": other, "disks": [boot, *body["disks"][1:]]}
        id = request["requestId"]
        another_id = f"{id[:-1]}{'0' if id[-1] != '0' else '1'}"
        for what, sent, sent_id in (
            ("the same insert", body, id),
            ("its request id with another machine", renamed, id),
            ("its name with another request id", body, another_id),
        ):
            second = None
            try:
                with self.asking():
                    operation = self._ask("instances.insert", requestId=sent_id, body=sent)
                    second = self._second(operation, machine)
                said = f"operation {operation.get('name')} of {operation.get('operationType')}"
            except _FAILURES as error:
                said = str(error)
            yield Finding(f"GCP to {what}", second is None, said if second is None else f"another machine: {second.id}")

    def _second(self, operation: Mapping[str, Any], machine: Machine) -> Machine | None:
        """What the insert has made beside this machine. Not by the list, which may be late."""
        done = operation

        def is_done() -> bool:
            nonlocal done
            done = self._ask("zoneOperations.get", operation=operation["name"])
            return done.get("status") == "DONE"

        self.until(is_done, 120)
        made = str(done.get("targetId", machine.id))
        if made == machine.id or done.get("error"):
            return None
        self.made.append(replace(machine, id=made))
        return self.made[-1]

    def _operation(self, request: Mapping[str, Any]) -> Finding:
        """By which a repetition is known that comes after GCP has forgotten the request id."""
        id = request["requestId"]
        asked = f'(operationType = "insert") (clientOperationId = "{id}")'
        try:
            told = self._ask("zoneOperations.list", filter=asked).get("items", [])
        except _FAILURES as error:
            return Finding("its insert is found by its request id", None, str(error))
        found = [each for each in told if each.get("clientOperationId") == id]
        return Finding(
            "its insert is found by its request id", bool(found), f"{len(found)} of {len(told)} operations shown"
        )

    def _born(self, request: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
        told, body = self._instance(machine), request["body"]
        labels = told.get("labels") or {}
        lacks = sorted(key for key, value in body["labels"].items() if labels.get(key) != value)
        yield Finding(
            "its labels are there from birth", not lacks, f"missing: {', '.join(lacks)}" if lacks else f"{len(labels)}"
        )
        asked, scheduling = body["scheduling"], told.get("scheduling") or {}
        other = {key: scheduling.get(key) for key, value in asked.items() if scheduling.get(key) != value}
        said = ", ".join(f"{key}: {value}" for key, value in (other or asked).items())
        yield Finding("it is scheduled as it was asked for", not other, said)
        disks = told.get("disks", [])
        stays = [each for each in disks if not each.get("autoDelete")]
        yield Finding(
            "its disks end with it", bool(disks) and not stays, f"{len(disks)} disks, {len(stays)} would stay"
        )
        disk = self._disk(request)
        ours = disk is not None and (disk.get("labels") or {}).get(FLEET) == label_value(self.fleet)
        yield Finding(
            "its disk has its labels", ours, "not there" if disk is None else str(sorted(disk.get("labels") or {}))
        )
        items = {each["key"]: each.get("value") for each in (told.get("metadata") or {}).get("items", [])}
        keys = items.get("block-project-ssh-keys")
        yield Finding("the project's SSH keys do not open it", keys == "TRUE", f"block-project-ssh-keys: {keys}")

    def _extended(self, request: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
        later_s = int(self.cloud.clock.unix_s()) + 3 * self.longest_s
        try:
            self.cloud.extend(machine, later_s)
        except _FAILURES as error:
            yield Finding("the moment of its expiry can be moved", False, str(error))
            return

        def is_moved() -> bool:
            now = self.now(machine)
            return now is not None and now.expires_unix_s == later_s

        began_s = self.cloud.clock.monotonic_s()
        moved = self.until(is_moved, 2.0 * self.cloud.guarantees.list_delay_s)
        after_s = self.cloud.clock.monotonic_s() - began_s
        yield Finding("the moment of its expiry can be moved", moved, f"in the list after {after_s:.0f} s")
        disk = self._disk(request)
        on_disk = None if disk is None else (disk.get("labels") or {}).get(EXPIRES)
        yield Finding("and that of its disk", on_disk == str(later_s), str(on_disk))

    # ---- death

    def _owners_end(self, request: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
        began_s = self.cloud.clock.monotonic_s()
        self.cloud.terminate([machine])
        yield from self._ended(machine, "owner", began_s)
        yield self._no_disk(request)

    def _shutdown(self) -> Iterator[Finding]:
        """The way of the agent, the watchdog and the bootstrap: the guest shuts itself down. GCP then keeps it, stopped."""
        request, machine = self._another(2, _LOOK)
        if machine is None:
            yield Finding("a machine that shuts itself down is made", None, str(request))
            return
        seen: list[Machine | None] = []

        def is_down() -> bool:
            seen.append(self.now(machine))
            return seen[-1] is None or seen[-1].state == "gone" or seen[-1].ended_by == "itself"

        down = self.until(is_down)
        now = seen[-1]
        there = now is not None and now.state != "gone"
        said = ("stopped, and its disk is kept" if there else "gone") if down else "it runs on"
        yield Finding(
            "a guest's shutdown is seen", down and (not there or (now is not None and now.ended_by == "itself")), said
        )
        console = self._console(machine)
        has = [each for each in ("python", "pip", "gcloud") if f"holdfast-{each} True" in console]
        ok = None if "holdfast-looked" not in console else len(has) == 3
        yield Finding(
            "the image has Python 3.11, pip and gcloud", ok, f"on the console: {', '.join(has) or 'nothing of it'}"
        )
        self.cloud.terminate([machine])
        yield Finding("what is stopped can be ended", self.gone(machine), machine.id)
        yield self._no_disk(request)

    def _preempted(self) -> Iterator[Finding]:
        """GCP simulates a maintenance event, which preempts a spot machine as a real one would."""
        _, machine = self._another(3, _WATCH)
        if machine is None:
            yield Finding("a machine to be preempted is made", None, str(_))
            return
        if not self.until(lambda: "holdfast-watching" in self._console(machine), _BOOT_S):
            yield Finding("it listens to its metadata", None, f"nothing on its console within {_BOOT_S:.0f} s")
        began_s = self.cloud.clock.monotonic_s()
        try:
            self._ask("instances.simulateMaintenanceEvent", instance=machine.id)
        except _FAILURES as error:
            yield Finding("a preemption can be simulated", None, str(error))
            self.cloud.terminate([machine])
            return
        heard: list[str] = []

        def is_gone() -> bool:
            heard.extend(line for line in self._console(machine).splitlines() if "holdfast-heard" in line)
            now = self.now(machine)
            return now is None or now.state == "gone"

        gone = self.until(is_gone, 300)
        after_s = self.cloud.clock.monotonic_s() - began_s
        notice = heard[-1].partition("holdfast-heard ")[2].strip() if heard else "nothing was seen on its console"
        yield Finding("a preemption is announced in the metadata", True if heard else None, notice)
        yield Finding("preempted: it is gone", gone, f"{machine.id} {after_s:.0f} s after the event")
        now = self.now(machine)
        by = None if now is None else now.ended_by
        yield Finding("preempted: GCP says so", by == "provider", f"{by}; operations: {self._operations(machine)}")

    def _lifetime(self) -> Iterator[Finding]:
        request, machine = self._another(4, _WAIT, lifetime_s=_SHORT_S)
        if machine is None:
            yield Finding("a machine with a short life is made", None, str(request))
            return
        began_s = self.cloud.clock.monotonic_s()
        gone = self.gone(machine)
        after_s = self.cloud.clock.monotonic_s() - began_s
        promised = self.cloud.guarantees
        most_s = _SHORT_S + promised.boot_s + promised.stop_s + POLL_S
        said = f"gone {after_s:.0f} s after its answer, of {_SHORT_S} s; operations: {self._operations(machine)}"
        yield Finding("maxRunDuration ends it", gone and after_s <= most_s, said if gone else "it runs on")
        yield self._no_disk(request)

    def _another(self, launch: int, script: str, lifetime_s: int | None = None) -> tuple[Any, Machine | None]:
        """Its request; why there is none, where there is none."""
        request = self.cloud.request(self.order(launch, script, lifetime_s=lifetime_s))
        try:
            return request, self.create(request)
        except HoldfastError as error:
            return error, None

    def _ended(self, machine: Machine, by: str, began_s: float) -> Iterator[Finding]:
        gone = self.gone(machine)
        after_s = self.cloud.clock.monotonic_s() - began_s
        yield Finding(f"ended by its {by}: it is gone", gone, f"{machine.id} after {after_s:.0f} s")
        now = self.now(machine)
        said = None if now is None else now.ended_by
        yield Finding(f"ended by its {by}: GCP says so", said == by, f"{said}; operations: {self._operations(machine)}")
        if now is not None:
            bill = self.cloud.bill(now)
            yield Finding("a bill by GCP's prices", bill.final, f"${dollars(bill.microusd)} for {bill.billed_s} s")

    # ---- what is left beside machines

    def remove_rest(self) -> None:
        """Disks that are too young to be called left over as well: nobody else makes any for this fleet."""
        super().remove_rest()
        for disk in self._all("disks"):
            if not disk.get("users"):
                zone = last(disk["zone"])
                self._gcp.calls.call("compute", "disks.delete", project=self._gcp.project, zone=zone, disk=disk["name"])

    def rest(self) -> list[str]:
        return super().rest() + [f"disk {each['name']}" for each in self._all("disks")]

    def _all(self, kind: str) -> list[dict[str, Any]]:
        """With this fleet's label."""
        wanted = f'(labels.{FLEET} = "{label_value(self.fleet)}")'
        pages = self._gcp.calls.pages("compute", f"{kind}.aggregatedList", project=self._gcp.project, filter=wanted)
        scopes = [scope for page in pages for scope in (page.get("items") or {}).values()]
        return [each for scope in scopes for each in scope.get(kind, [])]

    def _no_disk(self, request: Mapping[str, Any]) -> Finding:
        gone = self.until(lambda: self._disk(request) is None, 60)
        return Finding(
            "its disk is gone with it", gone, str(request["body"]["disks"][0]["initializeParams"]["diskName"])
        )

    # ---- asking

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._gcp.calls.call("compute", method, project=self._gcp.project, zone=self._zone, **parameters)

    def _instance(self, machine: Machine) -> dict[str, Any]:
        return self._ask("instances.get", instance=machine.id)

    def _disk(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        name = request["body"]["disks"][0]["initializeParams"]["diskName"]
        try:
            return self._ask("disks.get", disk=name)
        except Refused as error:
            if error.refusal.is_absence:
                return None
            raise

    def _console(self, machine: Machine) -> str:
        """Empty where it cannot be read: a machine that goes takes it along."""
        try:
            return str(self._ask("instances.getSerialPortOutput", instance=machine.id).get("contents", ""))
        except (Refused, Unanswered, NotSent):
            return ""

    def _operations(self, machine: Machine) -> str:
        """What GCP has done to it, in its own words."""
        try:
            pages = self._gcp.calls.pages(
                "compute",
                "zoneOperations.list",
                project=self._gcp.project,
                zone=self._zone,
                filter=f'(targetId = "{machine.id}")',
            )
            kinds = [each.get("operationType", "?") for page in pages for each in page.get("items", [])
                     if str(each.get("targetId")) == machine.id]  # fmt: skip
        except _FAILURES as error:
            return str(error)
        return ", ".join(dict.fromkeys(kinds)) or "none"
