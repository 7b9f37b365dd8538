"""A fleet's home in its store: runs are enrolled there, found there, and signed off; news of them is left there.

See `core.fleet_home` for what lies where. Nothing that matters is only here: each run's own records are the truth about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, StoreError, UsageError
from holdfast.core.fleet_home import (
    CONTROLLERS,
    INBOX,
    OVER,
    RUNS,
    ControllerPulse,
    Enrolment,
    News,
    RunOver,
    controller_key,
    enrolment_key,
    news_key,
    over_key,
    parse_news,
    run_id_of,
)
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import FORMAT_VERSION, seal
from holdfast.fleet.instructions import Over
from holdfast.fleet.mandate import Mandate
from holdfast.fleet.overview import Overview
from holdfast.store.base import Store
from holdfast.store.open import normalise_url
from holdfast.store.records import read_record, write_record

__all__ = ["HEARD_S", "Home", "home_for"]

HEARD_S = 90
"""A controller whose last pulse is older than this is not there any more, as far as anybody can know."""
_FORGOTTEN_S = 86400
"""The pulse of a controller that never left is removed by another one after this."""


def home_for(home: str, run_url: str) -> str:
    """The home's URL in its one spelling. UsageError where the run would lie among the home's own records."""
    canonical, run = normalise_url(home), normalise_url(run_url)
    inside = [prefix for prefix in (RUNS, OVER, INBOX, CONTROLLERS) if f"{run}/".startswith(f"{canonical}/{prefix}")]
    if run == canonical or inside:
        raise UsageError(
            f"{run_url} lies where the fleet's home {home} keeps its own records ({inside[0] if inside else 'the same URL'}): give "
            f"the home a prefix of its own, like {canonical}/home"
        )
    return canonical


class Home:
    """Thread safety: every method, as the store."""

    def __init__(self, store: Store, *, clock: Clock, tokens: TokenSource) -> None:
        self._store, self._clock, self._tokens = store, clock, tokens

    @property
    def url(self) -> str:
        return self._store.url

    # ---- runs

    def enrol(self, mandate: Mandate, url: str, name: str) -> Enrolment:
        """From now on controllers of this home look after it. StoreError."""
        record = Enrolment(
            format=FORMAT_VERSION, nonce=self._tokens(), run_id=mandate.run_id, url=url, name=name, provider=mandate.provider,
            place=mandate.place, at_unix_s=self._clock.unix_s(),
        )  # fmt: skip
        found = write_record(self._store, enrolment_key(mandate.run_id), record)
        self.ring(mandate.run_id, "enrolled")
        return found

    def run_ids(self) -> list[str]:
        """Of every run that somebody has to look after."""
        return _ids(entry.key for entry in self._store.list(RUNS))

    def enrolment(self, run_id: str) -> Enrolment | None:
        """None: confirmed that it is not, or no more, there."""
        return read_record(self._store, enrolment_key(run_id), Enrolment)

    def sign_off(self, run: Enrolment, over: Over, overview: Overview) -> RunOver:
        """How it ended is written first, then its entry is removed. Twice is as good as once."""
        record = RunOver(
            format=FORMAT_VERSION, nonce=self._tokens(), run_id=run.run_id, url=run.url, name=run.name, outcome=over.outcome,
            exit_code=over.exit_code, reasons=over.reasons, launches=len(overview.launches),
            billed_s=sum(billed_s for _, billed_s, _ in overview.by_market), cost_microusd=overview.spent_microusd,
            on_demand_microusd=overview.on_demand_microusd, at_unix_s=self._clock.unix_s(),
        )  # fmt: skip
        found = write_record(self._store, over_key(run.run_id), record)
        self._store.delete(enrolment_key(run.run_id))
        return found

    def over_ids(self) -> list[str]:
        return _ids(entry.key for entry in self._store.list(OVER))

    def over(self, run_id: str) -> RunOver | None:
        return read_record(self._store, over_key(run_id), RunOver)

    # ---- news

    def ring(self, run_id: str, what: Literal["enrolled", "cancelled"]) -> bool:
        """Whether it could be said. Nothing depends on it: without it a controller is slower."""
        try:
            self._store.put(news_key(run_id, what), b"")
        except StoreError:
            return False
        return True

    def news(self) -> dict[str, News | None]:
        """By key; None for what is none of ours."""
        return {entry.key: parse_news(entry.key) for entry in self._store.list(INBOX)}

    def drop_news(self, key: str) -> None:
        self._store.delete(key)

    # ---- controllers

    def beat(self, id: str, host: str, pid: int, runs: int) -> None:
        pulse = ControllerPulse(
            format=FORMAT_VERSION, id=id, host=host, pid=pid, runs=runs, at_unix_s=self._clock.unix_s()
        )
        self._store.put(controller_key(id), seal(pulse))

    def leave(self, id: str) -> None:
        self._store.delete(controller_key(id))

    def controllers(self) -> list[tuple[ControllerPulse, int]]:
        """Those that were heard within HEARD_S, newest first, and seconds since then; by this machine's clock. Pulses of a day ago
        are removed."""
        now_s, found = self._clock.unix_s(), []
        for entry in list(self._store.list(CONTROLLERS)):
            try:
                pulse = read_record(self._store, entry.key, ControllerPulse)
            except IntegrityError:
                continue
            if pulse is None:
                continue
            ago_s = max(0, int(now_s - pulse.at_unix_s))
            if ago_s <= HEARD_S:
                found.append((pulse, ago_s))
            elif ago_s > _FORGOTTEN_S:
                self._store.delete(entry.key)
        return sorted(found, key=lambda each: each[1])


def _ids(keys: Iterable[str]) -> list[str]:
    return [run_id for run_id in map(run_id_of, keys) if run_id is not None]
