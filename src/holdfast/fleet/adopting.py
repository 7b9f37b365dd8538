"""From an entry in a fleet's home to a run in care: its store, its mandate, its provider, its controller.

What many runs can share they share: one client for each bucket, one provider and one lookout for each place, one index, and what
disks and addresses cost. The mandate is always read from the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from holdfast.core.clock import Clock
from holdfast.core.errors import RunConflict
from holdfast.core.fleet_home import Enrolment
from holdfast.core.ids import TokenSource
from holdfast.core.jobfile import parse_job
from holdfast.fleet.index import Index
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.mandate import extras_of, read_mandate, terms_of, wanted_of
from holdfast.fleet.pace import Pace
from holdfast.fleet.shell import Controller
from holdfast.fleet.starting import controller_of
from holdfast.ledger.append import Ledger
from holdfast.provider.base import Instances, MachineSpec, Wanted
from holdfast.provider.registry import instances_named
from holdfast.store.base import Store

__all__ = ["AdoptedRun", "Adopter"]


@dataclass(slots=True, kw_only=True)
class AdoptedRun:
    """Implements `fleet_controller.Adopted`."""

    controller: Controller
    lookout: Lookout
    wanted: Wanted
    ledger: Ledger

    def flush(self) -> None:
        self.ledger.flush()

    def close(self) -> None:
        self.ledger.close()


class Adopter:
    """Thread safety: calls from any thread."""

    def __init__(
        self,
        home_url: str,
        open_store: Callable[[str], Store],
        *,
        clock: Clock,
        tokens: TokenSource,
        say: Callable[[str], None],
        pace: Pace,
        index: Index | None = None,
        slice_s: int | None = None,
        instances: Callable[..., Instances] = instances_named,
    ) -> None:
        """`open_store` keeps what it has opened, and closes it; see `store.beneath.SharedStores`."""
        self._home_url, self._open_store, self._instances = home_url, open_store, instances
        self._clock, self._tokens, self._say, self._pace = clock, tokens, say, pace
        self._index, self._slice_s = index, slice_s
        self._lock = Lock()
        self._providers: dict[tuple[str, str, tuple[str, ...]], Instances] = {}
        self._lookouts: dict[tuple[int, str], Lookout] = {}
        self._extras: dict[tuple[int, str], int] = {}

    def __call__(self, run: Enrolment) -> AdoptedRun:
        """Raises what opening a store and a provider raises, and RunConflict where another run lives at the URL by now."""
        store = self._open_store(run.url)
        mandate = read_mandate(store)
        if mandate.run_id != run.run_id:
            raise RunConflict(
                f"another run lives at {run.url} than the one that was enrolled here ({run.run_id}); what is left of that one "
                f"`holdfast sweep-leaks {run.provider}` ends"
            )
        wanted = wanted_of(parse_job(mandate.job_text, "the launched job file"))
        provider = self._provider(mandate.provider, mandate.place, wanted.regions)
        terms = terms_of(mandate, store.url, provider, slice_s=self._slice_s, extras=self._extras_of)
        lookout = self._lookout(provider, mandate.fleet)

        def say(line: str) -> None:
            self._say(f"{run.name} ({run.url}): {line}")

        node = f"controller-{self._tokens()[:8]}"
        ledger = Ledger(store, attempt=0, node=node, clock=self._clock, flush_every_s=None)
        controller = controller_of(
            mandate, store, provider, clock=self._clock, tokens=self._tokens, sink=ledger, say=say, pace=self._pace,
            index=self._index, lookout=lookout, terms=terms,
        )  # fmt: skip
        return AdoptedRun(controller=controller, lookout=lookout, wanted=terms.wanted, ledger=ledger)

    def _provider(self, name: str, place: str, regions: tuple[str, ...]) -> Instances:
        """One for each place and set of regions: a list of machines is a list of those."""
        with self._lock:
            key = (name, place, regions)
            if key not in self._providers:
                self._providers[key] = self._instances(name, place, regions, run_url=self._home_url)
            return self._providers[key]

    def _lookout(self, provider: Instances, fleet: str) -> Lookout:
        with self._lock:
            key = (id(provider), fleet)
            if key not in self._lookouts:
                self._lookouts[key] = Lookout(provider, fleet, clock=self._clock, pace=self._pace, say=self._say)
            return self._lookouts[key]

    def _extras_of(self, provider: Instances, spec: MachineSpec, wanted: Wanted) -> int:
        key = (id(provider), repr((spec, wanted)))
        with self._lock:
            known = self._extras.get(key)
        if known is None:
            known = extras_of(provider, spec, wanted)
            with self._lock:
                self._extras[key] = known
        return known
