"""From a mandate to a controller that can be run: its terms read, the bootstrap script of its machines made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.core.bootstrap import Piece, bootstrap_script
from holdfast.core.clock import Clock
from holdfast.core.events import Sink
from holdfast.core.ids import TokenSource
from holdfast.core.jobfile import parse_job
from holdfast.core.launches import client_token
from holdfast.fleet.code import own_wheel
from holdfast.fleet.index import Index
from holdfast.fleet.instructions import Over, Propose
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.mandate import Mandate, terms_of, wanted_of
from holdfast.fleet.records import RunRecords
from holdfast.fleet.shell import Controller, Pace
from holdfast.fleet.state import Outlook, instruct
from holdfast.fleet.terms import Terms
from holdfast.fleet.view import Offered, RunView, see
from holdfast.provider.base import Check, Instances, Offer, Order
from holdfast.store.base import Store

__all__ = ["FirstChoice", "boot_with", "controller_of", "first_choice"]


def boot_with(url: str, provider: Instances, pieces: Callable[[], list[Piece]], terms: Terms) -> Callable[[int], str]:
    """The bootstrap script of a launch. Without a grant a machine is there no longer than with the shortest one. `pieces` are
    asked for when there is one to make."""
    facts = provider.boot_facts
    limit_s = min(facts.boot_limit_s, terms.changeover_s + terms.useful_s)

    def boot(launch: int) -> str:
        return bootstrap_script(
            run_url=url, launch=launch, pieces=pieces(), end_command=facts.end_command, boot_limit_s=limit_s,
            folder=facts.folder, python=facts.python, machine_command=facts.machine_command, environment=facts.environment,
        )  # fmt: skip

    return boot


def controller_of(
    mandate: Mandate,
    store: Store,
    provider: Instances,
    *,
    clock: Clock,
    tokens: TokenSource,
    sink: Sink,
    say: Callable[[str], None],
    pace: Pace,
    slice_s: int | None = None,
    index: Index | None = None,
    lookout: Lookout | None = None,
    terms: Terms | None = None,
) -> Controller:
    """Raises UsageError for a job that contradicts itself. `index`, `lookout`: those of a fleet."""
    terms = terms or terms_of(mandate, store.url, provider, slice_s=slice_s)
    records = RunRecords(store, clock=provider.clock, tokens=tokens, index=index, run_id=mandate.run_id)
    boot = boot_with(store.url, provider, lambda: [own_wheel(store)], terms)
    return Controller(records, provider, terms, boot=boot, clock=clock, sink=sink, say=say, pace=pace, lookout=lookout)


@dataclass(frozen=True, slots=True)
class FirstChoice:
    """What a controller would do first, on what is known now. Nothing is written or launched."""

    offers: tuple[Offer, ...]
    launch: Propose | None
    over: Over | None
    outlook: Outlook
    terms: Terms
    checks: tuple[Check, ...]
    """What the provider says to it. Empty where nothing would be launched."""


def first_choice(mandate: Mandate, url: str, provider: Instances) -> FirstChoice:
    """The same code that will decide decides here."""
    terms = terms_of(mandate, url, provider)
    now_s = int(provider.clock.unix_s())
    offers = tuple(provider.offers(wanted_of(parse_job(mandate.job_text))))
    view, instructions, outlook = instruct(see(RunView(), Offered(now_s, offers)), terms, now_s)
    launch = next((each for each in instructions if isinstance(each, Propose)), None)
    over = next((each for each in instructions if isinstance(each, Over)), None)
    checks = () if launch is None else tuple(provider.preflight(_trial_order(launch, terms, now_s)))
    return FirstChoice(view.offers, launch, over, outlook, terms, checks)


def _trial_order(launch: Propose, terms: Terms, now_s: int) -> Order:
    """As it would be placed, but for the script."""
    return Order(
        token=client_token("preflight", launch.launch), fleet=terms.fleet, run_id="preflight", launch=launch.launch,
        allowed=launch.allowed, spec=terms.spec, user_data="#!/bin/sh\n", lifetime_s=terms.budget.slice_s,
        expires_unix_s=now_s + terms.budget.slice_s, tags=terms.labels,
    )  # fmt: skip
