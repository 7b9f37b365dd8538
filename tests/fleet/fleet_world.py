"""A controller in the imagined world: made, killed, made again; and what must hold whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from imagined import BOOT_S, STOP_S, Fuse, GivenUp, ImaginedCloud, ImaginedMachine, Spec, pool

from holdfast.core.clock import Clock
from holdfast.core.events import CollectingSink
from holdfast.core.ids import seeded_tokens
from holdfast.core.launches import Ended, ended_key
from holdfast.core.sealed import unseal
from holdfast.fleet.instructions import Over
from holdfast.fleet.records import RunRecords
from holdfast.fleet.shell import Controller, Pace
from holdfast.fleet.terms import Terms
from holdfast.policy.backoff import Backoff, Fallback
from holdfast.policy.budget_facts import BudgetLimits
from holdfast.policy.market.rules_facts import Rules
from holdfast.policy.retry import RetryLimits
from holdfast.provider.base import MachineSpec, Wanted
from holdfast.store.base import Body, Entry
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock

__all__ = ["SPOT_MICROUSD_H", "FusedStore", "World", "always", "never"]

SPOT_MICROUSD_H, DEMAND_MICROUSD_H = 1_000_000, 3_000_000
STEP_S = 10


def always(_: int) -> bool:
    return True


def never(_: int) -> bool:
    return False


class FusedStore(MemoryStore):
    """The controller's way to the store."""

    def __init__(self, inner: MemoryStore, fuse: Fuse) -> None:
        super().__init__()
        self._contents = inner._contents
        self._fuse = fuse

    def put_new(self, key: str, body: bytes) -> bool:
        result: bool = self._fuse.around(lambda: MemoryStore.put_new(self, key, body))
        return result

    def put(self, key: str, body: Body) -> None:
        self._fuse.around(lambda: MemoryStore.put(self, key, body))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        result: bytes = self._fuse.around(lambda: MemoryStore.get(self, key, max_bytes=max_bytes))
        return result

    def delete(self, key: str) -> None:
        self._fuse.around(lambda: MemoryStore.delete(self, key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        entries: list[Entry] = self._fuse.around(lambda: list(MemoryStore.list(self, prefix)))
        return iter(entries)


def standing_pools(zones: int = 2) -> dict[Any, Spec]:
    spot = {pool(f"z{i}"): Spec(lambda _, i=i: SPOT_MICROUSD_H + 50_000 * i, always) for i in range(zones)}
    return {**spot, pool("z0", "on-demand"): Spec(lambda _: DEMAND_MICROUSD_H, always)}


@dataclass
class World:
    """One run."""

    pools: dict[Any, Spec] = field(default_factory=standing_pools)
    budget_microusd: int | None = None
    rules: Rules = field(default_factory=lambda: Rules(fallback=Fallback(3, 600)))
    deadline_s: int | None = None
    policy: str = "greedy"
    work_s: int = 1800
    cloud_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    run_id: str = "run"

    def __post_init__(self) -> None:
        self.store, self.clock = MemoryStore(), ManualClock()
        self.cloud = ImaginedCloud(
            self.store,
            self.clock,
            self.pools,
            DEMAND_MICROUSD_H,
            work_s=self.work_s,
            seed=self.seed,
            run_id=self.run_id,
            **self.cloud_options,
        )
        self.cloud.advance(0)
        self.born_s = self.cloud.now_s
        self.controllers = 0
        self.sink = CollectingSink()

    @property
    def terms(self) -> Terms:
        known_work = self.work_s if self.deadline_s is not None else None
        deadline_s = None if self.deadline_s is None else self.born_s + self.deadline_s
        return Terms(
            run_id=self.run_id, url="memory://run", fleet="fleet", name="test", provider="imagined",
            guarantees=self.cloud.guarantees, wanted=Wanted(), spec=MachineSpec(), rules=self.rules, started_unix_s=self.born_s,
            work_s=known_work, deadline_unix_s=deadline_s, policy=self.policy, changeover_s=BOOT_S + 60, final_s=16,
            claim_limit_s=400, budget=BudgetLimits(cap_microusd=self.budget_microusd, slice_s=900, max_nodes=2),
            retry=RetryLimits(after_failure=Backoff(10, 60), after_preemption=Backoff(10, 60), in_a_storm=Backoff(10, 60)),
        )  # fmt: skip

    def controller(self, fuse: Fuse | None = None) -> Controller:
        fuse = fuse or Fuse()
        self.controllers += 1
        self.cloud.fuse = fuse
        clock: Clock = self.clock
        records = RunRecords(
            FusedStore(self.store, fuse), clock=clock, tokens=seeded_tokens(1000 * self.seed + self.controllers)
        )
        return Controller(
            records, self.cloud, self.terms, boot=lambda launch: f"boot {launch}", clock=clock, sink=self.sink,
            pace=Pace(step_s=STEP_S, records_s=2 * STEP_S, list_s=STEP_S, offers_s=STEP_S),
        )  # fmt: skip

    def play(
        self,
        script: Callable[[World], None] = lambda world: None,
        *,
        fuse: Fuse | None = None,
        away_s: int = 30,
        most_s: int = 4 * 3600,
    ) -> Over:
        """Until the run is over. `script` is called before each step: what happens in the world. A controller whose fuse has blown
        is followed by another one after `away_s`."""
        controller = self.controller(fuse)
        while self.cloud.now_s < self.born_s + most_s:
            script(self)
            try:
                over = controller.step()
            except GivenUp:
                self.cloud.advance(away_s)
                controller = self.controller()
                continue
            self.check()
            if over is not None:
                return over
            self.cloud.advance(STEP_S)
        raise AssertionError(f"not over after {most_s} s: {controller.outlook}; {self.story()}")

    def play_for(self, seconds: int, script: Callable[[World], None] = lambda world: None) -> Over | None:
        """A new controller, for so long."""
        controller = self.controller()
        for _ in range(seconds // STEP_S):
            script(self)
            if (over := controller.step()) is not None:
                return over
            self.check()
            self.cloud.advance(STEP_S)
        return None

    def abandon(self, seconds: int) -> None:
        """No controller any more."""
        for _ in range(seconds // STEP_S):
            self.cloud.advance(STEP_S)
            self.check()

    # ---- what must hold

    def check(self) -> None:
        assert not self.cloud.thefts, self.cloud.thefts
        if self.budget_microusd is not None:
            assert self.cloud.spent_microusd() <= self.budget_microusd, self.story()

    def check_end(self, *, booked: bool = True) -> None:
        """Nothing is left, each launch had one machine at most, and the records know every cent."""
        self.check()
        assert not self.cloud.alive(), self.story()
        if self.cloud.honours_tokens:
            tokens = [machine.token for machine in self.cloud.machines_]
            assert len(tokens) == len(set(tokens)), self.story()
        if booked:
            assert self.booked_microusd() == self.cloud.spent_microusd(), self.story()

    def booked_microusd(self) -> int:
        launches = {int(entry.key.split("/")[1]) for entry in self.store.list("launches/")}
        booked = [
            unseal(self.store.get(ended_key(launch), max_bytes=1 << 20), Ended, what="ended") for launch in launches
        ]
        return sum(each.cost_microusd for each in booked)

    def working(self) -> ImaginedMachine | None:
        return next((each for each in self.cloud.machines_ if each.phase == "working" and each.gone_s is None), None)

    def story(self) -> str:
        lines = [f"{event.unix_s - self.born_s:7.0f} {event.name} {event.fields}" for event in self.sink.events]
        for machine in self.cloud.machines_:
            lines.append(str(replace(machine, cloud=None)))  # type: ignore[type-var]
        return "\n".join(["", *lines[-60:]])


__all__ += ["BOOT_S", "DEMAND_MICROUSD_H", "STEP_S", "STOP_S", "standing_pools"]
