"""The rehearsal cloud's client: `Instances` over HTTP, and what only a rehearsal can do (preempt a machine, break the API, ask
for the prices that were)."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError, UsageError
from holdfast.core.failures import Failure
from holdfast.provider.base import Bill, Check, Leftover, Machine, MachineSpec, Offer, Order, Wanted
from holdfast.provider.local.billing import bill
from holdfast.provider.local.clock import CloudClock
from holdfast.provider.local.starting import BILL, find, find_or_start
from holdfast.provider.local.wire import (
    TAG_EXPIRES,
    TAG_FLEET,
    TAG_LAUNCH,
    TAG_RUN,
    TAG_TOKEN,
    Address,
    AllowedPool,
    CreateRequest,
    MachineFacts,
    Refusal,
)

__all__ = ["LocalCloud"]

_T = TypeVar("_T")
_ANSWER_S, _END_S = 30.0, 60.0
_MOST_USER_DATA_BYTES = 16 * 1024


class _Type(msgspec.Struct, frozen=True):
    accelerators: dict[str, int] = {}
    cpus: float = 2
    memory_gib: float = 8


class LocalCloud:
    """See `provider.base.Instances`. Thread safety: every method. It survives neither this client's death nor depends on it: the
    cloud is a process of its own."""

    name = "local"

    def __init__(
        self,
        address: Address,
        folder: Path,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`transport` and `clock` for a cloud without a network and without real time; see `testing.cloud.tabletop`."""
        self.address, self.folder = address, folder
        self.guarantees, self.boot_facts = address.guarantees, address.boot_facts
        self.speed = address.speed
        self.clock: Clock = CloudClock(
            address.origin_real_s, address.start_unix_s, address.speed, clock or SystemClock()
        )
        self._http = httpx.Client(
            base_url=address.endpoint,
            headers={"Authorization": f"Bearer {address.secret}"},
            timeout=_ANSWER_S,
            trust_env=False,
            transport=transport,
        )
        weakref.finalize(self, self._http.close)

    @classmethod
    def open(cls, folder: Path, config: Path | None = None) -> LocalCloud:
        """The cloud of this folder; it is started, with that configuration, if none runs there. ProviderError."""
        folder = folder.resolve()
        return cls(find_or_start(folder, config), folder)

    @classmethod
    def running(cls, folder: Path) -> LocalCloud | None:
        """The cloud that runs there; None is none."""
        address = find(folder.resolve())
        return None if address is None else cls(address, folder.resolve())

    def close(self) -> None:
        """Close the connections; the cloud goes on."""
        self._http.close()

    def end(self) -> None:
        """End every machine and then the cloud itself; what it has written stays in the folder. ProviderError if that takes too
        long."""
        with suppress(ProcessLookupError):
            server = os.pidfd_open(self.address.pid)
            try:
                self._post("/end", {})
                if not select.select([server], [], [], _END_S)[0]:
                    raise ProviderError(
                        f"the rehearsal cloud in {self.folder} does not end; its process is {self.address.pid}"
                    )
            finally:
                os.close(server)
        self.close()

    # Instances.

    def offers(self, wanted: Wanted) -> list[Offer]:
        found = self._get("/offers", {}, list[tuple[Offer, _Type | None]])
        return [offer for offer, type in found if _fits(offer, type or _Type(), wanted)]

    def extras_microusd_h(self, spec: MachineSpec, region: str) -> int:
        rules = self.address.rules
        return spec.disk_gib * rules.disk_microusd_gib_h + rules.address_microusd_h

    def request(self, order: Order) -> dict[str, Any]:
        _check(order)
        own = {
            TAG_FLEET: order.fleet,
            TAG_RUN: order.run_id,
            TAG_LAUNCH: str(order.launch),
            TAG_TOKEN: order.token,
            TAG_EXPIRES: str(order.expires_unix_s),
        }
        spec = order.spec
        request = CreateRequest(
            token=order.token,
            allowed=[AllowedPool(each.pool.name, each.ceiling_microusd_h) for each in order.allowed],
            tags={**order.tags, **own},
            user_data=order.user_data,
            lifetime_s=order.lifetime_s,
            disk_gib=spec.disk_gib,
            disk_type=spec.disk_type,
            image=spec.image,
            network=dict(spec.network),
            role=spec.role,
            scopes=list(spec.scopes),
            local_ssd=spec.local_ssd,
        )
        built: dict[str, Any] = msgspec.to_builtins(request)
        return built

    def create(self, request: Mapping[str, Any]) -> Machine:
        body = {"request": dict(request)}
        token = request.get("token")
        try:
            answer = self._http.post("/create", json=body)
        except httpx.ConnectError as error:
            raise LaunchFailed(f"the rehearsal cloud does not answer: {error}", Failure.ERROR) from None
        except httpx.HTTPError as error:
            raise OutcomeUnknown(f"the answer to the create call with token {token} was lost: {error}") from None
        if answer.status_code == 200:
            return _decoded(answer.content, Machine)
        refusal = _decoded(answer.content, Refusal)
        said = f"the rehearsal cloud refuses to launch: {refusal.code}: {refusal.message}"
        if refusal.failure is None:
            raise OutcomeUnknown(said)
        raise LaunchFailed(said, Failure[refusal.failure], retry_after_s=refusal.retry_after_s)

    def machines(self, fleet: str, run_id: str | None = None) -> list[Machine]:
        run = {} if run_id is None else {"run": run_id}
        return self._get("/machines", {"fleet": fleet, **run}, list[Machine])

    def extend(self, machine: Machine, expires_unix_s: int) -> None:
        self._post("/extend", {"machine": machine.id, "expires_unix_s": expires_unix_s})

    def terminate(self, machines: Sequence[Machine]) -> None:
        if machines:
            self._post("/terminate", {"ids": [machine.id for machine in machines]})

    def bill(self, machine: Machine) -> Bill:
        facts = self._get("/facts", {"machine": machine.id}, MachineFacts)
        now_unix_s = math.ceil(self.clock.unix_s())
        until = machine.gone_unix_s or now_unix_s
        prices = self.prices(machine.pool.name, machine.created_unix_s, max(machine.created_unix_s, until))
        return bill(machine, facts, self.address.rules, prices, now_unix_s)

    def leftovers(self, fleet: str) -> list[Leftover]:
        return self._get("/leftovers", {"fleet": fleet}, list[Leftover])

    def remove(self, leftovers: Sequence[Leftover]) -> None:
        if leftovers:
            self._post("/remove", {"ids": [each.id for each in leftovers]})

    def preflight(self, order: Order) -> list[Check]:
        address = self.address
        where = f"machines in {address.isolation}, network {address.network}, {address.speed:g} seconds in one"
        checks = [Check(name="cloud", ok=True, said=f"runs in {self.folder}: {where}")]
        try:
            self.request(order)
            checks.append(Check(name="request", ok=True, said="the order can be asked for"))
        except UsageError as error:
            checks.append(Check(name="request", ok=False, said=str(error), fix="change the job file"))
        offered = {offer.pool: offer for offer in self.offers(Wanted())}
        for each in order.allowed:
            offer = offered.get(each.pool)
            said = "no such pool" if offer is None else f"${offer.microusd_h / 1e6:.4f} an hour"
            full = "" if offer is None or offer.available else ", full now"
            fix = "" if offer else f"name it in the configuration of the cloud in {self.folder}"
            checks.append(Check(name=f"pool {each.pool.name}", ok=offer is not None, said=said + full, fix=fix))
        return checks

    # What only a rehearsal can do.

    def preempt(self, machine_id: str, *, lead_s: float | None = None) -> None:
        """Take it, with a notice so long before; None: as configured, 0: without any."""
        self._post("/do", {"machine": machine_id, "do": "preempt", "lead_s": lead_s})

    def advise(self, machine_id: str) -> None:
        """A rebalance recommendation."""
        self._post("/do", {"machine": machine_id, "do": "rebalance"})

    def withdraw(self, machine_id: str) -> None:
        """Its preemption is off."""
        self._post("/do", {"machine": machine_id, "do": "withdraw"})

    def misbehave(self, **faults: Any) -> None:
        """From now on the API has these faults and no others: the keys of `faults` in the configuration."""
        self._post("/change", {"faults": faults})

    def set_pool(self, pool: str, *, capacity: int | None = None, price: float | str | None = None) -> None:
        """From now on its capacity, or its price in dollars per hour, is this."""
        self._post("/change", {"pool": pool, "capacity": capacity, "price": price})

    def prices(self, pool: str, since_unix_s: float, until_unix_s: float) -> list[tuple[int, int]]:
        """(from which second of the cloud's time, millionths of a dollar per hour), the first one since `since_unix_s`."""
        asked = {"pool": pool, "since": str(since_unix_s), "until": str(until_unix_s)}
        return self._get("/prices", asked, list[tuple[int, int]])

    def invoice(self) -> dict[str, Any]:
        """What everything has cost until now, as the provider sees it: by a process that shares no code with ours, from its log."""
        command = [sys.executable, "-m", BILL, str(self.folder), "--until", str(math.ceil(self.clock.unix_s()))]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProviderError(f"the bill of the rehearsal cloud in {self.folder} cannot be computed: {done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def console(self, machine_id: str) -> str:
        """What its script has written."""
        path = self.folder / "consoles" / f"{Path(machine_id).name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _get(self, path: str, query: Mapping[str, str], type: type[_T]) -> _T:
        return _decoded(self._asked("GET", path, params=dict(query)), type)

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        self._asked("POST", path, json=dict(body))

    def _asked(self, method: str, path: str, **what: Any) -> bytes:
        try:
            answer = self._http.request(method, path, **what)
        except httpx.HTTPError as error:
            raise ProviderError(f"no answer of the rehearsal cloud to {method} {path}: {error}") from None
        if answer.status_code != 200:
            refusal = _decoded(answer.content, Refusal)
            raise ProviderError(f"the rehearsal cloud refuses {method} {path}: {refusal.code}: {refusal.message}")
        return answer.content


def _decoded(body: bytes, type: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.DecodeError as error:
        raise ProviderError(f"the rehearsal cloud's answer is not understood: {error}") from None


def _check(order: Order) -> None:
    """UsageError for what cannot be asked for."""
    if not order.allowed:
        raise UsageError(f"launch {order.launch} allows no pool")
    if len({each.pool.market for each in order.allowed}) > 1:
        raise UsageError(f"launch {order.launch} allows pools on two markets; a launch asks on one")
    elsewhere = [each.pool.name for each in order.allowed if each.pool.provider != LocalCloud.name]
    if elsewhere:
        raise UsageError(f"{elsewhere[0]} is no pool of the rehearsal cloud; its pools begin with local/")
    if len(order.user_data.encode()) > _MOST_USER_DATA_BYTES:
        raise UsageError(f"user data is at most {_MOST_USER_DATA_BYTES} bytes, not {len(order.user_data.encode())}")


def _fits(offer: Offer, type: _Type, wanted: Wanted) -> bool:
    pool = offer.pool
    named = not wanted.instance_types or pool.instance_type in wanted.instance_types
    placed = pool.region in (wanted.regions or (pool.region,)) and pool.zone in (wanted.zones or (pool.zone,))
    accelerated = not wanted.accelerators or any(
        type.accelerators.get(name, 0) >= count for name, count in wanted.accelerators
    )
    strong = type.cpus >= (wanted.cpus or 0) and type.memory_gib >= (wanted.memory_gib or 0)
    return named and placed and accelerated and strong
