"""An imagined fleet of any size: stores in memory that count what is asked of them, a provider whose machines stay as they are."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from holdfast.core.clock import Clock
from holdfast.core.fleet_home import word_news_key
from holdfast.core.ids import random_token
from holdfast.core.launches import Holder, MachineWord, Pool, Pulse, client_token, holder_key, pulse_key, word_key
from holdfast.core.sealed import FORMAT_VERSION, seal
from holdfast.fleet.adopting import Adopter
from holdfast.fleet.fleet_controller import FleetController
from holdfast.fleet.home import Home
from holdfast.fleet.index import Index
from holdfast.fleet.mandate import MANDATE_KEY, Mandate
from holdfast.fleet.pace import FleetPace
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
from holdfast.store.base import Body, Entry
from holdfast.store.memory import MemoryStore

__all__ = ["CountedStore", "Fleet", "Steady", "usd_a_day"]

JOB = """\
name: run-{number}
resources: {{infra: aws/us-east-1, accelerators: A100:1}}
run: python train.py
budget: $400
deadline: 60h
plan: {{work: 40h, changeover: 5 min}}
"""
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
TYPES = ("p4d.24xlarge", "p4de.24xlarge")
MARKETS: tuple[Literal["spot", "on-demand"], ...] = ("spot", "on-demand")
LISTED = 32_000_000
_USD = {"list": 5e-6, "put": 5e-6, "get": 0.4e-6, "delete": 0.0}
"""Of one request to S3 in us-east-1."""


def usd_a_day(a_minute: Mapping[str, float]) -> float:
    return sum(_USD[kind] * count for kind, count in a_minute.items()) * 1440


class CountedStore(MemoryStore):
    """Counts requests by kind; each may take a time, as over a network."""

    def __init__(self, url: str, counts: Counter[str], latency_s: list[float]) -> None:
        super().__init__()
        self._url, self._counts, self._latency_s, self._counting = url, counts, latency_s, threading.Lock()

    def _asked(self, kind: str) -> None:
        with self._counting:
            self._counts[kind] += 1
        if self._latency_s[0]:
            time.sleep(self._latency_s[0])

    def put(self, key: str, body: Body) -> None:
        self._asked("put")
        super().put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        self._asked("put")
        if len(body) > 100_000:
            # The wheel: a thousand runs hold the same one, and this process one copy.
            return self._contents.objects.setdefault(key, body) is body
        return super().put_new(key, body)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self._asked("get")
        return super().get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._asked("get")
        super().read_into(key, offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found = list(super().list(prefix))
        for _ in range(max(1, -(-len(found) // 1000))):
            self._asked("list")
        return iter(found)

    def delete(self, key: str) -> None:
        self._asked("delete")
        super().delete(key)


@dataclass
class Steady:
    """Implements `provider.base.Instances`."""

    clock: Clock
    name: str = "aws"
    call_s: float = 0.0
    there: dict[str, Machine] = field(default_factory=dict)
    created_at_s: list[float] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.guarantees = Guarantees(
            honours_tokens=True, shutdown_terminates=True, enforces_lifetime=False, tags_at_birth=True, list_delay_s=300,
            notice_s=120, minimum_s=60, boot_s=180, stop_s=120,
        )  # fmt: skip
        self.boot_facts = BootFacts(end_command="shutdown -h now")
        self.lock = threading.Lock()

    def offers(self, wanted: Wanted) -> list[Offer]:
        self.asked["offers"] += 1
        pools = [Pool("aws", "us-east-1", zone, kind, market) for market in MARKETS for zone in ZONES for kind in TYPES]
        return [
            Offer(
                pool=pool,
                microusd_h=LISTED if pool.market == "on-demand" else 9_000_000 + 100_000 * number,
                on_demand_microusd_h=LISTED,
            )
            for number, pool in enumerate(pools)
        ]

    def extras_microusd_h(self, spec: MachineSpec, region: str) -> int:
        return 20_000

    def request(self, order: Order) -> dict[str, Any]:
        return {
            "run": order.run_id, "launch": order.launch, "token": order.token, "fleet": order.fleet, "user_data": order.user_data,
            "pools": [each.pool.name for each in order.allowed],
        }  # fmt: skip

    def create(self, request: Mapping[str, Any]) -> Machine:
        self.created_at_s.append(time.monotonic())
        if self.call_s:
            time.sleep(self.call_s)
        pool = Pool.named(request["pools"][0])
        machine = Machine(
            id=f"i-{request['token']}", pool=pool, state="running", fleet=request["fleet"], run_id=request["run"],
            launch=request["launch"], token=request["token"], microusd_h=9_000_000, created_unix_s=self.clock.unix_s(),
        )  # fmt: skip
        with self.lock:
            return self.there.setdefault(machine.token, machine)

    def machines(self, fleet: str, run_id: str | None = None) -> list[Machine]:
        self.asked["machines"] += 1
        with self.lock:
            return list(self.there.values())

    def bill(self, machine: Machine) -> Bill:
        self.asked["bill"] += 1
        billed_s = max(60, int(self.clock.unix_s() - machine.created_unix_s))
        return Bill(billed_s=billed_s, microusd=billed_s * machine.microusd_h // 3600, final=False)

    def extend(self, machine: Machine, expires_unix_s: int) -> None:
        self.asked["extend"] += 1

    def terminate(self, machines: Sequence[Machine]) -> None:
        raise AssertionError(f"nobody may end {machines}")

    def leftovers(self, fleet: str) -> list[Leftover]:
        return []

    def remove(self, leftovers: Sequence[Leftover]) -> None:
        """There are none."""

    def preflight(self, order: Order) -> list[Check]:
        return []


@dataclass
class Fleet:
    """Runs that are launched and work, and controllers of them."""

    runs: int
    clock: Clock
    counts: Counter[str] = field(default_factory=Counter)
    latency_s: list[float] = field(default_factory=lambda: [0.0])
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.provider = Steady(self.clock)
        self.stores = {"s3://bucket/fleet": CountedStore("s3://bucket/fleet", self.counts, self.latency_s)}
        self.home_store = self.stores["s3://bucket/fleet"]
        self.ids = {f"run{number:06d}": f"s3://bucket/runs/{number}" for number in range(self.runs)}
        home = Home(self.home_store, clock=self.clock, tokens=random_token)
        for number, (run_id, url) in enumerate(self.ids.items()):
            store = self.stores[url] = CountedStore(url, self.counts, self.latency_s)
            mandate = Mandate(
                format=FORMAT_VERSION, nonce=random_token(), run_id=run_id, fleet="fleet", provider="aws", place="",
                job_text=JOB.format(number=number), started_unix_s=int(self.clock.unix_s()), home=self.home_store.url,
            )  # fmt: skip
            store.put_new(MANDATE_KEY, seal(mandate))
            home.enrol(mandate, url, f"run-{number}")

    def controller(
        self, index: Index | None = None, pace: FleetPace | None = None, clock: Clock | None = None
    ) -> FleetController:
        pace, clock = pace or FleetPace(), clock or self.clock
        adopt = Adopter(
            self.home_store.url, self.stores.__getitem__, clock=clock, tokens=random_token, say=lambda line: None, pace=pace.run,
            index=index, instances=lambda *_, **__: self.provider,
        )  # fmt: skip
        home = Home(self.home_store, clock=clock, tokens=random_token)
        return FleetController(
            home, adopt, clock=clock, id=random_token(), say=self.said.append, pace=pace, index=index
        )

    def everybody_works(self, launch: int = 1) -> None:
        """Each machine is there, holds its launch, and has claimed."""
        for run_id, url in self.ids.items():
            machine, store, now_s = self._machine(run_id, launch), self.stores[url], self.clock.unix_s()
            holder = Holder(format=FORMAT_VERSION, launch=launch, machine=machine, boot="b", at_unix_s=now_s)
            store.put_new(holder_key(launch), seal(holder))
            self.say(run_id, launch, 0, "claimed", attempt=launch)
            pulse = Pulse(
                format=FORMAT_VERSION, launch=launch, machine=machine, uptime_s=100, step=10, kept_step=10, kept_work_s=60,
                at_unix_s=now_s,
            )  # fmt: skip
            store.put(pulse_key(launch), seal(pulse))

    def say(self, run_id: str, launch: int, part: int, kind: Any, **more: Any) -> None:
        word = MachineWord(
            format=FORMAT_VERSION, launch=launch, part=part, machine=self._machine(run_id, launch), kind=kind, uptime_s=100,
            at_unix_s=self.clock.unix_s(), **more,
        )  # fmt: skip
        self.stores[self.ids[run_id]].put_new(word_key(launch, part), seal(word))
        self.home_store.put(word_news_key(run_id, launch, part), b"")

    def taken(self, share: float) -> int:
        """So many of the machines have a notice, all at once."""
        run_ids = list(self.ids)[:: max(1, round(1 / share))]
        for run_id in run_ids:
            self.say(run_id, 1, 1, "notice", notice="preemption", deadline_s=120)
        return len(run_ids)

    def _machine(self, run_id: str, launch: int) -> str:
        return f"i-{client_token(run_id, launch)}"

    def aged(self, seconds: float) -> None:
        """Machines have been there for so long."""
        with self.provider.lock:
            self.provider.there = {
                token: replace(machine, created_unix_s=machine.created_unix_s - seconds)
                for token, machine in self.provider.there.items()
            }


def while_counting(counts: Counter[str], act: Callable[[], None]) -> tuple[dict[str, int], float]:
    """Requests by kind, and CPU seconds of this process."""
    before, began_s = Counter(counts), time.process_time()
    act()
    took_s = time.process_time() - began_s
    return {kind: counts[kind] - before[kind] for kind in ("list", "get", "put", "delete")}, took_s


__all__ += ["while_counting"]
