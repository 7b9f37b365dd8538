"""A fleet's controller in the imagined world: some runs, each with its cloud, one home, one clock; made, killed, made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fleet_world import STEP_S, FusedStore, World
from imagined import Fuse, GivenUp

from holdfast.core.fleet_home import Enrolment, RunOver, enrolment_key, over_key, word_news_key
from holdfast.core.ids import seeded_tokens
from holdfast.core.sealed import seal, unseal
from holdfast.fleet.fleet_controller import FleetController
from holdfast.fleet.home import Home
from holdfast.fleet.index import Index
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.pace import FleetPace, Pace
from holdfast.fleet.records import RunRecords
from holdfast.fleet.shell import Controller
from holdfast.provider.base import Wanted
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock

__all__ = ["PACE", "FleetOfWorlds", "InCare", "damaged"]

PACE = FleetPace(
    run=Pace(step_s=STEP_S, records_s=2 * STEP_S, list_s=STEP_S, offers_s=STEP_S, meter_s=STEP_S), hear_s=STEP_S,
    roll_s=2 * STEP_S, beat_s=3 * STEP_S,
)  # fmt: skip


@dataclass(slots=True)
class InCare:
    """Implements `fleet_controller.Adopted`."""

    controller: Controller
    lookout: Lookout
    wanted: Wanted

    def flush(self) -> None:
        """Events are collected in memory."""

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class FleetOfWorlds:
    worlds: Sequence[World]
    pace: FleetPace = PACE
    rings: bool = True
    """False: machines may not write to the inbox."""
    home: MemoryStore = field(default_factory=MemoryStore)
    made: int = 0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.by_id = {world.run_id: world for world in self.worlds}
        assert len(self.by_id) == len(self.worlds)
        for world in self.worlds:
            world.clock = world.cloud.clock = self.clock
            world.cloud.bell = lambda launch, part, world=world: self.ring(world.run_id, launch, part)
            self.enrol(world)

    def enrol(self, world: World) -> None:
        entry = Enrolment(
            format=1, nonce="n", run_id=world.run_id, url="memory://run", name=world.run_id, provider="imagined", place="",
            at_unix_s=self.clock.unix_s(),
        )  # fmt: skip
        assert self.home.put_new(enrolment_key(world.run_id), seal(entry))

    def ring(self, run_id: str, launch: int, part: int) -> None:
        if self.rings:
            self.home.put(word_news_key(run_id, launch, part), b"")

    def controller(self, fuse: Fuse | None = None, index: Index | None = None) -> FleetController:
        fuse = fuse or Fuse()
        self.made += 1
        tokens = seeded_tokens(self.made)
        lookouts: dict[str, Lookout] = {}
        for world in self.worlds:
            world.controllers += 1
            world.cloud.fuse = fuse
            lookouts[world.run_id] = Lookout(
                world.cloud, "fleet", clock=self.clock, pace=self.pace.run, say=self.said.append
            )

        def adopt(run: Enrolment) -> InCare:
            world, lookout = self.by_id[run.run_id], lookouts[run.run_id]
            records = RunRecords(
                FusedStore(world.store, fuse), clock=self.clock, tokens=tokens, index=index, run_id=run.run_id
            )
            controller = Controller(
                records, world.cloud, world.terms, boot=lambda launch: f"boot {launch}", clock=self.clock, sink=world.sink,
                pace=self.pace.run, lookout=lookout,
            )  # fmt: skip
            return InCare(controller, lookout, world.terms.wanted)

        return FleetController(
            Home(FusedStore(self.home, fuse), clock=self.clock, tokens=tokens), adopt, clock=self.clock, id=f"c{self.made}",
            say=self.said.append, pace=self.pace, index=index,
        )  # fmt: skip

    def advance(self, seconds: int) -> None:
        """Of all clouds at once: they have one clock."""
        for _ in range(seconds):
            self.clock.advance(1)
            for world in self.worlds:
                for machine in world.cloud.machines_:
                    machine.advance()
        for world in self.worlds:
            world.cloud.history.append((world.cloud.now_s, [world.cloud.shown(each) for each in world.cloud.machines_]))

    def play(
        self,
        script: Callable[[World], None] = lambda world: None,
        *,
        fuse: Fuse | None = None,
        index: Callable[[], Index | None] = lambda: None,
        away_s: int = 30,
        most_s: int = 4 * 3600,
    ) -> dict[str, RunOver]:
        """Until every run is over. `index` makes the one of each controller."""
        began_s = self.clock.unix_s()
        opened = index()
        fleet = self.controller(fuse, opened)
        while self.clock.unix_s() < began_s + most_s:
            for world in self.worlds:
                script(world)
            try:
                fleet.turn()
            except GivenUp:
                self.advance(away_s)
                if opened is not None:
                    opened.close()
                opened = index()
                fleet = self.controller(index=opened)
                continue
            self.check()
            if not list(self.home.list("runs/")):
                fleet.leave()
                if opened is not None:
                    opened.close()
                return self.overs()
            self.advance(STEP_S)
        raise AssertionError(f"not over after {most_s} s: {self.story()}")

    def overs(self) -> dict[str, RunOver]:
        return {world.run_id: self.overs_of(world.run_id) for world in self.worlds}

    def overs_of(self, run_id: str) -> RunOver:
        return unseal(self.home.get(over_key(run_id), max_bytes=1 << 20), RunOver, what="over")

    def check(self) -> None:
        for world in self.worlds:
            world.check()

    def check_end(self) -> None:
        """As for each run alone; and the home knows what it has cost."""
        for run_id, over in self.overs().items():
            world = self.by_id[run_id]
            world.check_end()
            assert over.cost_microusd == world.cloud.spent_microusd()
        assert not list(self.home.list("runs/"))

    def story(self) -> str:
        return "\n".join([*self.said[-40:], *(world.story() for world in self.worlds)])


def damaged(path: Path) -> None:
    """What a bad disk makes of it."""
    body = bytearray(path.read_bytes())
    body[len(body) // 3 : len(body) // 3 + 4096] = b"\xff" * 4096
    path.write_bytes(body)
