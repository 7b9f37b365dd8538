"""Machines of Google Cloud, launched one by one into one zone each. See `provider.base.Instances`, and docs/gcp.md."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import LaunchFailed, ProviderError
from holdfast.core.failures import Failure
from holdfast.core.launches import client_token
from holdfast.provider.base import (
    Bill,
    BootFacts,
    Check,
    Guarantees,
    Leftover,
    Machine,
    MachineSpec,
    Offer,
    Order,
    Wanted,
)
from holdfast.provider.gcp.asking import Images, Insert, insert_request
from holdfast.provider.gcp.billing import MINIMUM_S, Extras, bill_of, extras_of, extras_of_spec
from holdfast.provider.gcp.calls import Calls, NotSent, Refused, Unanswered, provider_error
from holdfast.provider.gcp.catalog import BillingCatalog
from holdfast.provider.gcp.creating import Creating
from holdfast.provider.gcp.extending import extend
from holdfast.provider.gcp.leavings import find_leftovers, remove_leftover
from holdfast.provider.gcp.market import Market
from holdfast.provider.gcp.preflight import checks
from holdfast.provider.gcp.prices import Prices
from holdfast.provider.gcp.sightings import ENDINGS, Life, end_of, lives_of, machine_of
from holdfast.provider.gcp.words import FLEET, PROVIDER, RUN, label_value, pool_of

__all__ = ["GcpInstances"]

_REMEMBER_S = 24 * 3600
"""So long a machine that is gone is told of."""
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/id"
_FAILURES = (Refused, Unanswered, NotSent)


class GcpInstances:
    """Implements `provider.base.Instances`.

    Thread safety: every method. `close` (or `with`) ends the connections. `create` waits for the operation, up to
    `operation_s`; then the outcome is unknown, and the same request again goes on waiting.
    """

    name = PROVIDER

    def __init__(
        self,
        project: str | None = None,
        *,
        prices: Prices | None = None,
        clock: Clock | None = None,
        images: Images | None = None,
        bucket: str | None = None,
        operation_s: float = 120.0,
        preemption_notice_s: int = 0,
        credentials: Any = None,
        endpoints: Mapping[str, str] | None = None,
    ) -> None:
        """`project` and `credentials`: None for the application-default ones. `prices`: None for the Cloud Billing Catalog.
        `bucket`: of the runs, for the preflight. `preemption_notice_s`: GCP's `preemptionNoticeDuration`, for spot; 0 leaves it
        out.
        """
        self.clock: Clock = clock or SystemClock()
        self.guarantees = Guarantees(
            honours_tokens=True, shutdown_terminates=False, enforces_lifetime=True, tags_at_birth=True, list_delay_s=60,
            notice_s=max(30, preemption_notice_s), minimum_s=MINIMUM_S, boot_s=180, stop_s=120,
        )  # fmt: skip
        self.boot_facts = BootFacts(
            # What has been stopped by its guest keeps its disk, until the controller deletes it.
            end_command="shutdown -h now", machine_command=f"curl -fsS -H 'Metadata-Flavor: Google' {_METADATA}",
        )  # fmt: skip
        self._calls = Calls(credentials=credentials, endpoints=endpoints)
        self._given_project, self._images, self._bucket = project, images or Images(), bucket
        self._preemption_notice_s = preemption_notice_s
        self._creating = Creating(self._calls, self.clock, operation_s, self._read)
        self._market = Market(self._calls, prices or BillingCatalog(self._calls, self.clock))
        self._lock = threading.Lock()
        self._seen: dict[str, Machine] = {}
        """Machines that this object has been shown, by id; those that are gone for `_REMEMBER_S`."""
        self._extras: dict[str, Extras] = {}
        self._recalled: set[tuple[str, str | None]] = set()
        """Fleets and runs of which the operations have been read once."""

    def __enter__(self) -> GcpInstances:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self._calls.close()

    @property
    def project(self) -> str:
        return self._given_project or self._calls.project()

    @property
    def calls(self) -> Calls:
        """Google's APIs, for questions that are no business of `Instances`."""
        return self._calls

    def offers(self, wanted: Wanted) -> list[Offer]:
        try:
            return self._market.offers(self.project, wanted)
        except _FAILURES as error:
            raise provider_error("what is on offer could not be found out", error) from error

    def request(self, order: Order) -> dict[str, Any]:
        return insert_request(order, self.project, self._images, preemption_notice_s=self._preemption_notice_s)

    def create(self, request: Mapping[str, Any]) -> Machine:
        insert = Insert.read(request)
        found = self._creating.create(insert)
        return found if isinstance(found, Machine) else self._gone(insert, found)

    def machines(self, fleet: str, run_id: str | None = None) -> list[Machine]:
        wanted = f'(labels.{FLEET} = "{label_value(fleet)}")'
        if run_id is not None:
            wanted += f' (labels.{RUN} = "{label_value(run_id)}")'
        try:
            there = [
                machine
                for page in self._calls.pages(
                    "compute", "instances.aggregatedList", project=self.project, filter=wanted
                )
                for scope in (page.get("items") or {}).values()
                for instance in scope.get("instances", [])
                if (machine := self._read(instance)) and machine.fleet == fleet and run_id in (None, machine.run_id)
            ]
            return there + self._past(fleet, run_id, {machine.id for machine in there})
        except _FAILURES as error:
            raise provider_error(f"the machines of fleet {fleet} could not be listed", error) from error

    def bill(self, machine: Machine) -> Bill:
        with self._lock:
            extras = self._extras.get(machine.id)
        if extras is None and machine.state != "gone":
            try:
                self._look(machine)
            except _FAILURES as error:
                raise provider_error(f"what {machine.id} costs could not be found out", error) from error
            with self._lock:
                extras = self._extras.get(machine.id)
        return bill_of(machine, extras or Extras(), self.clock.unix_s())

    def extras_microusd_h(self, spec: MachineSpec, region: str) -> int:
        """Disks and address of a machine, at most, as far as their prices are known."""
        return extras_of_spec(spec, self._market.prices, region)

    def extend(self, machine: Machine, expires_unix_s: int) -> None:
        try:
            extend(self._calls, self.project, machine, expires_unix_s)
        except _FAILURES as error:
            raise provider_error(f"the labels of {machine.id} may not have been changed", error) from error

    def terminate(self, machines: Sequence[Machine]) -> None:
        """By the instance's number, which is never used again. Without a request id: with one, the answer to a second try would be
        the failure of the first.
        """
        failures = []
        for machine in machines:
            try:
                self._calls.call(
                    "compute", "instances.delete", project=self.project, zone=machine.pool.zone, instance=machine.id
                )
            except Refused as error:
                if not error.refusal.is_absence:
                    failures.append(f"{machine.id}: {error}")
            except (Unanswered, NotSent) as error:
                failures.append(f"{machine.id}: {error}")
        if failures:
            raise ProviderError(
                f"GCP: {len(failures)} of {len(machines)} machines may not have been ended; ask again. {'; '.join(failures)}"
            )

    def leftovers(self, fleet: str) -> list[Leftover]:
        try:
            return find_leftovers(self._calls, self.project, fleet, self._market.prices, self.clock.unix_s())
        except _FAILURES as error:
            raise provider_error(f"what fleet {fleet} has left behind could not be listed", error) from error

    def remove(self, leftovers: Sequence[Leftover]) -> None:
        failures = []
        for leftover in leftovers:
            try:
                remove_leftover(self._calls, self.project, leftover)
            except _FAILURES as error:
                failures.append(f"{leftover.id}: {error}")
        if failures:
            raise ProviderError(f"GCP: could not be removed: {'; '.join(failures)}")

    def preflight(self, order: Order) -> list[Check]:
        return checks(self._calls, self._given_project, self.request, order, self._bucket, self._market)

    def _gone(self, insert: Insert, operation: Mapping[str, Any]) -> Machine:
        """It was made, and is not there any more."""
        id = str(operation.get("targetId", ""))
        pool = pool_of(insert.zone, insert.body)
        stub = {
            "id": id or insert.name, "zone": insert.zone, "status": "STOPPING", "labels": insert.body["labels"],
            "machineType": insert.body["machineType"], "creationTimestamp": operation["insertTime"],
        }  # fmt: skip
        machine = machine_of(stub, self._market.known_microusd_h(insert.project, pool))
        if machine is None:
            raise LaunchFailed(f"GCP: the request for {insert.name} has no labels of ours", Failure.BAD_REQUEST)
        try:
            life = self._lives().get(id)
        except (*_FAILURES, ProviderError):
            life = None
        return self._ended(replace(machine, pool=pool), life)

    def _read(self, instance: Mapping[str, Any]) -> Machine | None:
        machine = machine_of(instance, None)
        if machine is None:
            return None
        known = self._market.known_microusd_h(self.project, machine.pool)
        machine = machine if known is None else replace(machine, microusd_h=known)
        extras = extras_of(instance, self._market.prices, machine.pool.region, machine.pool.market)
        with self._lock:
            self._seen[machine.id], self._extras[machine.id] = machine, extras
        return machine

    def _past(self, fleet: str, run_id: str | None, there: set[str]) -> list[Machine]:
        """Machines that are gone, for a while. Operations are read when one has vanished, and once for each fleet and run."""
        now_s = self.clock.unix_s()
        with self._lock:
            for id in [id for id, each in self._seen.items() if (each.gone_unix_s or now_s) < now_s - _REMEMBER_S]:
                del self._seen[id]
                self._extras.pop(id, None)
            ours = [each for each in self._seen.values() if each.fleet == fleet and run_id in (None, each.run_id)]
            runs = {each.run_id for each in ours} | ({run_id} if run_id is not None else set())
            first = (fleet, run_id) not in self._recalled
        vanished = [each for each in ours if each.id not in there and each.state != "gone"]
        if not (vanished or first):
            return [each for each in ours if each.id not in there]
        lives = self._lives()
        missed = [self._missed(each, lives.get(each.id)) for each in vanished]
        known = {each.id for each in ours}
        for life in lives.values():
            recent = life.gone_unix_s is not None and life.gone_unix_s > now_s - _REMEMBER_S
            if recent and life.id not in known | there:
                run = next(
                    (run for run in sorted(runs) if client_token(run, life.named.launch) == life.named.token), None
                )
                if run is not None:
                    missed.append(end_of(life, fleet, run))
        with self._lock:
            self._seen.update((each.id, each) for each in missed)
            self._recalled.add((fleet, run_id))
        return [each for each in ours if each.state == "gone" and each.id not in there] + missed

    def _missed(self, machine: Machine, life: Life | None) -> Machine:
        """A machine that the list has left out: it may be gone, or the list may be late. One that is there can be asked for."""
        if life is not None and life.gone_unix_s is not None:
            return self._ended(machine, life)
        return self._look(machine) or self._ended(machine, life)

    def _look(self, machine: Machine) -> Machine | None:
        """None: it is not there."""
        try:
            found = self._calls.call(
                "compute", "instances.get", project=self.project, zone=machine.pool.zone, instance=machine.id
            )
        except Refused as error:
            if error.refusal.is_absence:
                return None
            raise
        return self._read(found)

    def _lives(self) -> dict[str, Life]:
        pages = self._calls.pages(
            "compute", "globalOperations.aggregatedList", project=self.project, filter=ENDINGS, maxResults=500
        )
        return lives_of(
            [
                operation
                for page in pages
                for scope in (page.get("items") or {}).values()
                for operation in scope.get("operations", [])
            ]
        )

    def _ended(self, machine: Machine, life: Life | None) -> Machine:
        gone_unix_s = None if life is None else life.gone_unix_s
        ended_by = None if life is None else life.ended_by
        gone_unix_s = self.clock.unix_s() if gone_unix_s is None else gone_unix_s
        return replace(machine, state="gone", gone_unix_s=gone_unix_s, ended_by=ended_by or machine.ended_by)
