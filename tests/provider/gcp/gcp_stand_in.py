"""A Compute Engine that keeps books: what is asked for is checked against Google's published description, and carried out.

It has the parts on which a launcher's correctness hangs: request ids that are remembered for an hour, names that are taken in
their zone until the instance is deleted, operations that end later and well or badly, a list that lags behind, instances that
are preempted and then gone from everything but the operations. Faults are played on chosen methods. Time is the tests' clock.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from gcp_described import Asked, Violation, described
from gcp_words import Fault, Operation, Said, error_answer, matches, stamp, unix_s_of, zone_of

from holdfast.testing.clock import ManualClock
from holdfast.testing.loopback import Answer, Request, listening, reply

__all__ = ["PROJECT", "GcpStandIn", "front", "stand_in"]

PROJECT = "some-project"
_BASES = {
    "/compute/v1/": ("compute", "v1"), "/storage/v1/": ("storage", "v1"), "/billing/": ("cloudbilling", "v1"),
    "/resources/": ("cloudresourcemanager", "v1"), "/iam/": ("iam", "v1"),
}  # fmt: skip
_ENDPOINTS = {api: base for base, (api, _) in _BASES.items()}
_REQUEST_IDS_S = 3600.0
_LATE_S = 20.0
_URL = "https://www.googleapis.com/compute/v1"
_ZONES = ("us-central1-a", "us-central1-b", "europe-west4-a")


@dataclass
class GcpStandIn:
    clock: ManualClock
    operation_s: float = 12.0
    list_delay_s: float = 0.0
    url: str = ""
    instances: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    """Every instance that ever was."""
    operations: list[Operation] = field(default_factory=list)
    disks: list[dict[str, Any]] = field(default_factory=list)
    addresses: list[dict[str, Any]] = field(default_factory=list)
    skus: list[dict[str, Any]] = field(default_factory=list)
    failing: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Zone → the error in which the operation of every insert ends."""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    machine_types: dict[str, dict[str, Any]] = field(default_factory=dict)
    quotas: dict[str, tuple[float, float]] = field(default_factory=dict)
    page_items: int = 2
    late: list[tuple[float, Asked]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def endpoints(self) -> dict[str, str]:
        return {api: f"{self.url}{base}" for api, base in _ENDPOINTS.items()}

    def play(self, method: str, how: str, times: int = 1, said: Said | None = None) -> None:
        self.faults.setdefault(f"compute.{method}", []).append(Fault(how, times, said))

    def preempt(self, instance: dict[str, Any]) -> None:
        """As GCP does it: an operation of the system, and the instance is deleted."""
        with self.lock:
            self._end(instance, "compute.instances.preempted")

    # HTTP.

    def handle(self, request: Request) -> None:
        text = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        split = urlsplit(request.path)
        base = next(base for base in _BASES if split.path.startswith(base))
        api = described(*_BASES[base])
        try:
            body = json.loads(text) if text else None
            asked = api.read(request.command, split.path[len(base) :], dict(parse_qsl(split.query)), body)
        except Violation as violation:
            self.violations.append(violation)
            reply(request, error_answer(Said(400, "invalid", str(violation))))
            return
        with self.lock:
            self.asked.append(asked)
            fault = self._fault(asked.method)
            if fault and fault.how == "late":
                self.late.append((self.clock.unix_s() + _LATE_S, asked))
            held = fault and fault.how in ("before", "late", "dropped")
            answer = Answer(200) if held else self._answer(api, asked)
        if fault and fault.how in ("lost", "dropped"):
            os.close(request.connection.detach())
            request.close_connection = True
        elif fault:
            reply(request, error_answer(fault.said or Said(503, "backendError", "Backend Error")))
        else:
            reply(request, answer)

    def _fault(self, method: str) -> Fault | None:
        waiting = self.faults.get(method)
        if not waiting:
            return None
        waiting[0].times -= 1
        return waiting.pop(0) if waiting[0].times == 0 else waiting[0]

    def _answer(self, api: Any, asked: Asked) -> Answer:
        try:
            if asked.method in self.forbidden:
                raise Said(403, "forbidden", f"Required permission for {asked.method}")
            self._settle()
            name = asked.method.replace(".", "_")
            found = getattr(self, name)(asked.given, asked.body)
        except Said as said:
            return error_answer(said)
        try:
            api.check_answer(asked.method, found)
        except Violation as violation:
            self.violations.append(violation)
        return Answer(200, (("Content-Type", "application/json"),), json.dumps(found).encode())

    # Compute Engine.

    def compute_instances_insert(self, given: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        zone, now_s, request_id = given["zone"], self.clock.unix_s(), given.get("requestId")
        for operation in self.operations:
            if request_id and operation.request_id == request_id and now_s - operation.at_s < _REQUEST_IDS_S:
                return self._shown(operation)
        if zone not in _ZONES:
            raise Said(404, "notFound", f"The resource 'projects/{PROJECT}/zones/{zone}' was not found")
        if body["machineType"].rpartition("/")[2] not in self.machine_types:
            raise Said(400, "invalid", "Invalid value for field 'resource.machineType': it does not exist.")
        key = (zone, body["name"])
        if key in self.instances:
            raise Said(409, "alreadyExists", f"The resource '{body['name']}' already exists")
        id = str(4_000_000_000_000_000_000 + len(self.made) + len(self.operations))
        instance = self._born(body, zone, id)
        self.instances[key] = instance
        operation = self._begin("insert", zone, f"instances/{body['name']}", id, request_id)
        error = self.failing.get(zone)

        def settle() -> None:
            if error is None:
                instance["status"] = "RUNNING"
            else:
                self._drop(key, instance)
                self.made.remove(instance)

        operation.error, operation.settle = error, settle
        self.made.append(instance)
        return self._shown(operation)

    def _born(self, body: dict[str, Any], zone: str, id: str) -> dict[str, Any]:
        instance = {key: value for key, value in body.items() if key not in ("labels", "metadata")}
        boot = body["disks"][0]["initializeParams"]
        now = stamp(self.clock.unix_s())
        if boot["diskName"] != body["name"]:
            raise Said(400, "invalid", "this stand-in wants the boot disk named like its machine")
        sizes = [disk["initializeParams"].get("diskSizeGb", "375") for disk in body["disks"]]
        kept = [{key: disk[key] for key in ("type", "autoDelete")} for disk in body["disks"]]
        disks = [disk | {"diskSizeGb": size} for disk, size in zip(kept, sizes, strict=True)]
        self.disks.append(
            {
                "name": body["name"], "zone": f"zones/{zone}", "sizeGb": boot["diskSizeGb"], "type": boot["diskType"],
                "labels": dict(boot["labels"]), "labelFingerprint": "AAAA", "creationTimestamp": now,
                "users": [f"instances/{body['name']}"],
            }
        )  # fmt: skip
        return instance | {
            "labelFingerprint": "AAAA", "id": id, "disks": disks, "zone": f"{_URL}/projects/{PROJECT}/zones/{zone}",
            "status": "PROVISIONING", "labels": dict(body["labels"]),
            "creationTimestamp": now, "metadata": {"items": body["metadata"]["items"]},
            "machineType": f"{_URL}/projects/{PROJECT}/{body['machineType']}", "kind": "compute#instance",
        }  # fmt: skip

    def compute_instances_get(self, given: dict[str, str], body: None) -> dict[str, Any]:
        return self._instance(given)

    def compute_instances_delete(self, given: dict[str, str], body: None) -> dict[str, Any]:
        return self._shown(self._end(self._instance(given), "delete"))

    def compute_instances_aggregatedList(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        until_s = self.clock.unix_s() - self.list_delay_s
        shown = [each for each in self.instances.values() if unix_s_of(each["creationTimestamp"]) <= until_s]
        return self._aggregated("instances", [(zone_of(each), each) for each in shown], given)

    def compute_zoneOperations_get(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        for operation in self.operations:
            if f"operation-{operation.id}" == given["operation"] and operation.zone == given["zone"]:
                return self._shown(operation)
        raise Said(404, "notFound", f"The resource {given['operation']} was not found")

    def compute_zoneOperations_list(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        if given["zone"] not in _ZONES:
            raise Said(404, "notFound", f"The resource 'projects/{PROJECT}/zones/{given['zone']}' was not found")
        shown = [self._shown(each) for each in self.operations if each.zone == given["zone"]]
        page, token = self._page([each for each in shown if matches(each, given.get("filter"))], given)
        return {"kind": "compute#operationList", "items": page} | token

    def compute_globalOperations_aggregatedList(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        shown = [(operation.zone, self._shown(operation)) for operation in self.operations]
        return self._aggregated("operations", shown, given)

    def compute_instances_setLabels(self, given: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return self._label(self._instance(given), body, f"instances/{given['instance']}")

    def compute_disks_get(self, given: dict[str, str], body: None) -> dict[str, Any]:
        for disk in self.disks:
            if disk["name"] == given["disk"] and zone_of(disk) == given["zone"]:
                return disk
        raise Said(404, "notFound", "no such disk")

    def compute_disks_setLabels(self, given: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        disk = self.compute_disks_get({"disk": given["resource"], "zone": given["zone"]}, None)
        return self._label(disk, body, f"disks/{given['resource']}")

    def _label(self, resource: dict[str, Any], body: dict[str, Any], target: str) -> dict[str, Any]:
        """Only on top of what the caller has read."""
        if body["labelFingerprint"] != resource["labelFingerprint"]:
            raise Said(412, "conditionNotMet", "Labels fingerprint either invalid or resource labels have changed")
        resource["labels"], resource["labelFingerprint"] = body["labels"], f"B{len(self.operations):03d}"
        return self._shown(self._begin("setLabels", zone_of(resource), target, str(resource.get("id", "9")), None))

    def compute_disks_aggregatedList(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        return self._aggregated("disks", [(zone_of(each), each) for each in self.disks], given)

    def compute_disks_delete(self, given: dict[str, str], body: None) -> dict[str, Any]:
        found = [each for each in self.disks if each["name"] == given["disk"] and zone_of(each) == given["zone"]]
        if not found:
            raise Said(404, "notFound", "no such disk")
        self.disks.remove(found[0])
        return self._shown(self._begin("delete", given["zone"], f"disks/{given['disk']}", "7", None))

    def compute_addresses_aggregatedList(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        places = [(each["region"].rpartition("/")[2], each) for each in self.addresses]
        return self._aggregated("addresses", places, given, scope="regions")

    def compute_addresses_delete(self, given: dict[str, str], body: None) -> dict[str, Any]:
        found = [each for each in self.addresses if each["name"] == given["address"]]
        if not found:
            raise Said(404, "notFound", "no such address")
        self.addresses.remove(found[0])
        return self._shown(self._begin("delete", "us-central1-a", f"addresses/{given['address']}", "8", None))

    def compute_machineTypes_get(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        if given["machineType"] not in self.machine_types or given["zone"] not in _ZONES:
            raise Said(404, "notFound", f"The resource {given['machineType']} was not found")
        return self.machine_types[given["machineType"]]

    def compute_machineTypes_aggregatedList(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        everywhere = [(zone, each) for zone in _ZONES for each in self.machine_types.values()]
        return self._aggregated("machineTypes", everywhere, given)

    def compute_acceleratorTypes_get(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        return {"name": given["acceleratorType"], "maximumCardsPerInstance": 4}

    def compute_acceleratorTypes_aggregatedList(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        t4 = {"name": "nvidia-tesla-t4", "maximumCardsPerInstance": 4}
        return self._aggregated("acceleratorTypes", [(zone, t4) for zone in _ZONES[1:]], given)

    def compute_projects_get(self, given: dict[str, str], body: None) -> dict[str, Any]:
        if given["project"] != PROJECT:
            raise Said(404, "notFound", f"no project {given['project']}")
        return {"name": PROJECT, "quotas": [{"metric": "GPUS_ALL_REGIONS", "limit": 8.0, "usage": 0.0}]}

    def compute_regions_get(self, given: dict[str, str], body: None) -> dict[str, Any]:
        quotas = [{"metric": name, "limit": limit, "usage": usage} for name, (limit, usage) in self.quotas.items()]
        return {"name": given["region"], "quotas": quotas}

    def compute_images_getFromFamily(self, given: dict[str, str], body: None) -> dict[str, Any]:  # noqa: N802
        return {"name": f"{given['family']}-v20260101", "family": given["family"]}

    # The other APIs.

    def cloudbilling_services_skus_list(self, given: dict[str, str], body: None) -> dict[str, Any]:
        page, token = self._page(self.skus, given)
        return {"skus": page} | token

    def cloudresourcemanager_projects_testIamPermissions(self, given: Any, body: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"permissions": [each for each in body["permissions"] if each not in self.forbidden]}

    def iam_projects_serviceAccounts_testIamPermissions(self, given: Any, body: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"permissions": [each for each in body["permissions"] if each not in self.forbidden]}

    def storage_buckets_get(self, given: dict[str, str], body: None) -> dict[str, Any]:
        return {"name": given["bucket"], "location": "US-CENTRAL1", "locationType": "region"}

    # Books.

    def _instance(self, given: dict[str, str]) -> dict[str, Any]:
        for (zone, name), instance in self.instances.items():
            if zone == given["zone"] and given["instance"] in (name, instance["id"]):
                return instance
        raise Said(404, "notFound", f"The resource {given['instance']} was not found")

    def _end(self, instance: dict[str, Any], kind: str) -> Operation:
        zone, name = zone_of(instance), instance["name"]
        instance["status"] = "STOPPING"
        operation = self._begin(kind, zone, f"instances/{name}", instance["id"], None)
        operation.settle = lambda: self._drop((zone, name), instance)
        return operation

    def _drop(self, key: tuple[str, str], instance: dict[str, Any]) -> None:
        if self.instances.get(key) is instance:
            del self.instances[key]
            self.disks = [each for each in self.disks if f"instances/{instance['name']}" not in each.get("users", [])]

    def _begin(self, kind: str, zone: str, target: str, target_id: str, request_id: str | None) -> Operation:
        now_s = self.clock.unix_s()
        operation = Operation(
            len(self.operations) + 1, kind, zone, target, target_id, now_s, now_s + self.operation_s, request_id
        )
        self.operations.append(operation)
        return operation

    def _settle(self) -> None:
        due = [asked for at_s, asked in self.late if at_s <= self.clock.unix_s()]
        self.late = [(at_s, asked) for at_s, asked in self.late if at_s > self.clock.unix_s()]
        for asked in due:
            with suppress(Said):
                self.compute_instances_insert(asked.given, asked.body)
        for operation in self.operations:
            if operation.settle is not None and self.clock.unix_s() >= operation.ends_s:
                settle, operation.settle = operation.settle, None
                settle()

    def _shown(self, operation: Operation) -> dict[str, Any]:
        done = self.clock.unix_s() >= operation.ends_s
        shown: dict[str, Any] = {
            "kind": "compute#operation", "id": str(operation.id), "name": f"operation-{operation.id}",
            "operationType": operation.kind, "status": "DONE" if done else "RUNNING",
            "zone": f"{_URL}/projects/{PROJECT}/zones/{operation.zone}", "targetId": operation.target_id,
            "targetLink": f"{_URL}/projects/{PROJECT}/zones/{operation.zone}/{operation.target}",
            "insertTime": stamp(operation.at_s), "user": "someone@example.com",
        }  # fmt: skip
        if operation.request_id:
            shown["clientOperationId"] = operation.request_id
        if done:
            shown["endTime"] = stamp(operation.ends_s)
            if operation.error:
                shown |= {
                    "error": {"errors": [operation.error]},
                    "httpErrorStatusCode": 503,
                    "httpErrorMessage": "SERVICE UNAVAILABLE",
                }
        return shown

    def _aggregated(
        self, kind: str, found: list[tuple[str, dict[str, Any]]], given: dict[str, str], scope: str = "zones"
    ) -> dict[str, Any]:
        matching = [(place, each) for place, each in found if matches(each, given.get("filter"))]
        page, token = self._page(matching, given)
        items: dict[str, Any] = {
            f"{scope}/{place}": {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": "There are no results"}}
            for place in _ZONES
            if scope == "zones"
        }
        for place, each in page:
            entry = items.setdefault(f"{scope}/{place}", {})
            entry.pop("warning", None)
            entry.setdefault(kind, []).append(each)
        return {"items": items} | token

    def _page(self, found: list[Any], given: dict[str, str]) -> tuple[list[Any], dict[str, str]]:
        start = int(given.get("pageToken", "0"))
        end = start + self.page_items
        return found[start:end], {"nextPageToken": str(end)} if end < len(found) else {}


class _Front:
    """One address for all stand-ins of a test process: the client library takes long to read its descriptions, for each anew."""

    url = ""
    behind: GcpStandIn | None = None

    def handle(self, request: Request) -> None:
        assert self.behind is not None
        self.behind.handle(request)


_FRONT = _Front()


@contextmanager
def front() -> Iterator[None]:
    """While the tests of a process run."""
    with listening(_FRONT.handle) as _FRONT.url:
        yield


@contextmanager
def stand_in(clock: ManualClock, kind: type[GcpStandIn] = GcpStandIn) -> Iterator[GcpStandIn]:
    """While the block runs, one at a time. At its end, everything that was asked must have been as described."""
    cloud = _FRONT.behind = kind(clock, url=_FRONT.url)
    yield cloud
    assert not cloud.violations, cloud.violations
