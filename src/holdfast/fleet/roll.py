"""All runs of a home as people want to see them: one line each. From the records alone, so it is true without any controller.

runs/, over/ ──→ each run's records (threads, index) ──→ Overview ──→ RunLine ──→ `holdfast status --home`, `cost --home`, JSON
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError
from holdfast.core.fleet_home import Enrolment, RunOver, enrolment_key, over_key
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import seal, unseal
from holdfast.fleet.home import Home
from holdfast.fleet.index import Index
from holdfast.fleet.overview import Overview, overview_of
from holdfast.fleet.phases import Phase
from holdfast.fleet.records import RunRecords
from holdfast.fleet.view import RunView, see
from holdfast.store.base import Store

__all__ = ["Roll", "RunLine", "line_of"]

_Record = TypeVar("_Record", Enrolment, RunOver)
_THREADS = 16
_ORDER = [
    phase.value for phase in (Phase.WORKING, Phase.LEAVING, Phase.STANDBY, Phase.COMING, Phase.ASKED, Phase.REFUSED)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run that is not over. Money in millionths of a dollar."""

    run_id: str
    name: str
    url: str
    phase: str
    """Of its live launches, the one that works first; `waiting`: there is none."""
    step: int | None
    kept_step: int | None
    launches: int
    spent_microusd: int
    reserved_microusd: int
    on_demand_microusd: int
    by_market: tuple[tuple[str, int, int], ...]
    cancelled: bool
    why: str | None
    """What has become of its newest launch, or why that was made; or why the run cannot be read."""
    problem: bool = False
    """It cannot be read, or records of it are not believed."""


def line_of(run: Enrolment, overview: Overview) -> RunLine:
    live = [line for line in overview.launches if line.phase != Phase.OVER.value]
    newest = live[-1] if live else overview.launches[-1] if overview.launches else None
    why = None if newest is None else newest.why or "; ".join(newest.reasons[:2])
    return RunLine(
        run_id=run.run_id, name=run.name, url=run.url,
        phase="+".join(sorted((line.phase for line in live), key=_ORDER.index)) or "waiting",
        step=max((line.step for line in overview.launches if line.step is not None), default=None),
        kept_step=max((line.kept_step for line in overview.launches if line.kept_step is not None), default=None),
        launches=len(overview.launches), spent_microusd=overview.spent_microusd, reserved_microusd=overview.reserved_microusd,
        on_demand_microusd=overview.on_demand_microusd, by_market=overview.by_market, cancelled=overview.cancelled,
        why=f"not believed: {overview.altered[0]}" if overview.altered else why, problem=bool(overview.altered),
    )  # fmt: skip


@dataclass(slots=True)
class _Known:
    run: Enrolment
    records: RunRecords
    view: RunView


class Roll:
    """Thread safety: none. What was read once is not read again: looking a second time asks for what is new."""

    def __init__(
        self,
        home: Home,
        open_store: Callable[[str], Store],
        *,
        clock: Clock,
        tokens: TokenSource,
        index: Index | None = None,
    ) -> None:
        self._home, self._open_store, self._clock, self._tokens = home, open_store, clock, tokens
        self._index = index
        self._known: dict[str, _Known] = {}
        self._over: dict[str, RunOver] = {}

    def look(self) -> tuple[list[RunLine], list[RunOver]]:
        """Runs that are not over, by name; and those that are, the newest first. StoreError where the home itself cannot be
        read."""
        run_ids, over_ids = self._home.run_ids(), self._home.over_ids()
        with ThreadPoolExecutor(_THREADS) as pool:
            lines = [line for line in pool.map(self._line, run_ids) if line is not None]
            for over in pool.map(self._over_of, [each for each in over_ids if each not in self._over]):
                if over is not None:
                    self._over[over.run_id] = over
        self._known = {run_id: known for run_id, known in self._known.items() if run_id in set(run_ids)}
        live = {line.run_id for line in lines}
        overs = sorted(self._over.values(), key=lambda each: -each.at_unix_s)
        if self._index is not None:
            self._index.flush()
        return sorted(lines, key=lambda line: (line.name, line.run_id)), [
            each for each in overs if each.run_id not in live
        ]

    def _line(self, run_id: str) -> RunLine | None:
        """None: it was signed off meanwhile."""
        run = None
        try:
            known = self._known.get(run_id)
            if known is None:
                run = self._cached(run_id, enrolment_key(run_id), Enrolment) or self._home.enrolment(run_id)
                if run is None:
                    return None
                self._keep(run_id, enrolment_key(run_id), run)
                records = RunRecords(
                    self._open_store(run.url), clock=self._clock, tokens=self._tokens, index=self._index, run_id=run_id
                )
                known = self._known[run_id] = _Known(run, records, RunView())
            run = known.run
            for event in known.records.read():
                known.view = see(known.view, event)
            altered = tuple(known.records.altered.values())
            return line_of(run, overview_of(known.view, int(self._clock.unix_s()), altered))
        except HoldfastError as error:
            return RunLine(
                run_id=run_id, name="?" if run is None else run.name, url="?" if run is None else run.url, phase="?", step=None,
                kept_step=None, launches=0, spent_microusd=0, reserved_microusd=0, on_demand_microusd=0, by_market=(),
                cancelled=False, why=f"{type(error).__name__}: {error}", problem=True,
            )  # fmt: skip

    def _over_of(self, run_id: str) -> RunOver | None:
        try:
            found = self._cached(run_id, over_key(run_id), RunOver) or self._home.over(run_id)
        except HoldfastError:
            return None
        if found is not None:
            self._keep(run_id, over_key(run_id), found)
        return found

    def _cached(self, run_id: str, key: str, kind: type[_Record]) -> _Record | None:
        data = None if self._index is None else self._index.get(run_id, key)
        try:
            return None if data is None else unseal(data, kind, what=key)
        except HoldfastError:
            return None

    def _keep(self, run_id: str, key: str, record: Enrolment | RunOver) -> None:
        if self._index is not None:
            self._index.put(run_id, key, seal(record))
