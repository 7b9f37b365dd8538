"""What somebody has asked for, written down once, so that any controller can go on with it; and what follows from it.

    job file ──→ Mandate (control/mandate), JobRecord (control/job), code ──→ terms_of ──→ Terms

A run has one mandate. Whoever launches another job at the same URL is told so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import msgspec

from holdfast.checkpoint.record import open_record
from holdfast.core.clock import Clock
from holdfast.core.errors import RunConflict, UsageError
from holdfast.core.ids import TokenSource
from holdfast.core.job_record import JOB_KEY, JobRecord
from holdfast.core.jobfile import JobFile, JobRecovery, Resources, parse_job
from holdfast.core.sealed import FORMAT_VERSION, digest
from holdfast.fleet.code import code_of
from holdfast.fleet.mounts import mounts_of
from holdfast.fleet.terms import Terms
from holdfast.policy.backoff import Fallback
from holdfast.policy.budget_facts import BudgetLimits
from holdfast.policy.market.rules_facts import Rules
from holdfast.policy.market.rules_parse import RULE_KEYS, parse_rules
from holdfast.provider.base import Instances, MachineSpec, Wanted
from holdfast.store.base import Store
from holdfast.store.records import read_record, write_record

__all__ = [
    "MANDATE_KEY",
    "Mandate",
    "commission",
    "extras_of",
    "provider_of",
    "read_mandate",
    "spec_of",
    "terms_of",
    "wanted_of",
]

MANDATE_KEY = "control/mandate"
DEFAULT_FALLBACK = Fallback(3, 600)
_MICRO = 1_000_000
_DEFAULT_SLICE_S = 3600


class Mandate(msgspec.Struct, frozen=True, kw_only=True):
    """One run's. The job file stands here as its user wrote it, flags applied."""

    format: int
    nonce: str
    run_id: str
    fleet: str
    provider: str
    place: str
    """Which one of the provider: a rehearsal cloud's folder, else empty."""
    job_text: str
    started_unix_s: int
    """On the provider's clock: deadlines count from here."""
    home: str = ""
    """The fleet that it belongs to, by its URL; empty: none, it is looked after alone."""


def read_mandate(store: Store) -> Mandate:
    """UsageError where nothing was launched."""
    found = read_record(store, MANDATE_KEY, Mandate)
    if found is None:
        raise UsageError(f"{store.url}: nothing has been launched here; `holdfast launch job.yaml` does")
    return found


def commission(
    job: JobFile,
    text: str,
    store: Store,
    provider: Instances,
    *,
    place: str,
    fleet: str,
    base: Path,
    clock: Clock,
    tokens: TokenSource,
    home: str = "",
) -> Mandate:
    """Write down what is wanted, and pack what machines need for it. The same job again finds what stands there. `home`: the fleet
    whose controllers look after it.

    Raises UsageError for a job without a command, RunConflict where another job lives at this URL, or one of another fleet.
    """
    record = _job_record(job, store, base, tokens(), home)
    run = open_record(store, clock=clock, tokens=tokens)
    mandate = Mandate(
        format=FORMAT_VERSION, nonce=tokens(), run_id=run.run_id, fleet=fleet, provider=provider.name, place=place, job_text=text,
        started_unix_s=int(provider.clock.unix_s()), home=home,
    )  # fmt: skip
    found = write_record(store, MANDATE_KEY, mandate)
    if found.job_text != text or found.provider != provider.name:
        raise RunConflict(
            f"{store.url}: another job has been launched here. Give this one a URL of its own (--run), or see `holdfast status`"
        )
    if found.home != home:
        how = f"into the fleet at {found.home}" if found.home else "without --home"
        raise RunConflict(f"{store.url}: this run was launched {how}, and cannot be moved")
    if _content(write_record(store, JOB_KEY, record)) != _content(record):
        raise RunConflict(
            f"{store.url}: this run was launched with other code or settings; a changed job needs a URL of its own"
        )
    return found


def _content(record: JobRecord) -> str:
    return digest(msgspec.json.encode(msgspec.structs.replace(record, nonce="", holdfast="")))


def _job_record(job: JobFile, store: Store, base: Path, nonce: str, home: str) -> JobRecord:
    if not (job.run or "").strip():
        raise UsageError("the job file has no `run:`, so there is nothing to launch")
    if job.num_nodes != 1:
        raise UsageError(
            "fleets launch runs of one machine so far: num_nodes is 1, or start the gang under Slurm or torchrun"
        )
    missing = [name for name, value in {**job.envs, **job.secrets}.items() if value is None]
    if missing:
        raise UsageError(f"no value for {', '.join(missing)}: give it with --env NAME=VALUE, or in the job file")
    recovery = _recovery(job.resources)
    try:
        return JobRecord(
            format=FORMAT_VERSION, nonce=nonce, home=home, name=job.name or "job", run=job.run or "", setup=job.setup or "",
            setup_cache=job.setup_cache,
            envs={name: str(value) for name, value in job.envs.items()},
            secrets={name: str(value) for name, value in job.secrets.items()},
            code=code_of(job.workdir, store, base), mounts=mounts_of(job, provider_of(job), store, base),
            holdfast=version("holdfast"),
            max_errors=recovery.max_restarts_on_errors if recovery.max_restarts_on_errors is not None else 3,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None


def _recovery(resources: Resources) -> JobRecovery:
    return resources.job_recovery if isinstance(resources.job_recovery, JobRecovery) else JobRecovery()


def provider_of(job: JobFile) -> str:
    """The provider that `resources.infra` names. UsageError where it names none, or several."""
    named = {(each.infra or "").split("/")[0] for each in job.resources.alternatives()}
    if len(named) > 1:
        raise UsageError(f"alternatives at several providers are not launched yet: {', '.join(sorted(named))}")
    (name,) = named
    if not name:
        raise UsageError("resources.infra says where: local, aws, aws/us-east-1, gcp/us-central1/us-central1-a, slurm")
    return name


def wanted_of(job: JobFile) -> Wanted:
    """Alternatives of one provider: any of their accelerators, in any of their places."""
    found = job.resources.alternatives()
    places = [(each.infra or "").split("/") for each in found]
    return Wanted(
        accelerators=tuple(dict.fromkeys((each.name, each.count) for one in found for each in one.wanted)),
        cpus=_number(found[0].cpus),
        memory_gib=_number(found[0].memory),
        instance_types=tuple(dict.fromkeys(one.instance_type for one in found if one.instance_type is not None)),
        regions=tuple(dict.fromkeys(place[1] for place in places if len(place) > 1)),
        zones=tuple(dict.fromkeys(place[2] for place in places if len(place) > 2)),
    )


def spec_of(job: JobFile) -> MachineSpec:
    resources, machine = job.resources, job.machine
    usual = MachineSpec()
    return MachineSpec(
        image=resources.image_id, disk_gib=resources.disk_size or usual.disk_gib, disk_type=resources.disk_tier,
        network=machine.network, role=machine.role, scopes=machine.scopes, local_ssd=machine.local_ssd,
    )  # fmt: skip


def _number(value: float | str | None) -> float | None:
    """`8`, `"8+"`: at least."""
    if value is None:
        return None
    try:
        return float(str(value).strip().removesuffix("+"))
    except ValueError:
        raise UsageError(f'not a number of CPUs or GiB: {value!r}; written like 8 or "8+"') from None


def rules_of(job: JobFile) -> Rules:
    """What the user allows. Where nothing is said of falling back, three failed looks or ten minutes are enough."""
    said = {key: getattr(job, key) for key in RULE_KEYS}
    if said.get("max_price") is None:
        said["max_price"] = job.resources.max_hourly_cost
    if job.resources.use_spot is not None and job.spot_policy == "auto":
        said["spot_policy"] = "spot" if job.resources.use_spot else "on-demand"
    rules = parse_rules({key: value or None for key, value in said.items()})
    if rules.fallback is None and rules.allow_on_demand and job.deadline is None:
        rules = replace(rules, fallback=DEFAULT_FALLBACK)
    return rules


def extras_of(provider: Instances, spec: MachineSpec, wanted: Wanted) -> int:
    """The dearest region that may be used."""
    regions = wanted.regions or tuple({offer.pool.region for offer in provider.offers(wanted)})
    return max((provider.extras_microusd_h(spec, region) for region in regions), default=0)


def terms_of(
    mandate: Mandate,
    url: str,
    provider: Instances,
    *,
    slice_s: int | None = None,
    extras: Callable[[Instances, MachineSpec, Wanted], int] | None = None,
) -> Terms:
    """What a controller works under. UsageError for what the job file contradicts itself in. `extras` finds what disks and
    addresses cost at most: asked for once where many runs want the same."""
    job = parse_job(mandate.job_text, "the launched job file")
    rules = rules_of(job)
    work_s = next(iter(job.plan.work_s.values()), None)
    deadline_s = (
        None if job.deadline is None else mandate.started_unix_s + int(job.deadline.left_s(mandate.started_unix_s))
    )
    changeover_s = None if job.plan.changeover is None else int(job.plan.changeover)
    recovery = _recovery(job.resources)
    codes: tuple[int, ...] = ()
    if recovery.recover_on_exit_codes is not None:
        said = recovery.recover_on_exit_codes
        codes = (said,) if isinstance(said, int) else tuple(said)
    cap = None if job.budget is None else round(job.budget * _MICRO)
    return Terms(
        run_id=mandate.run_id, url=url, fleet=mandate.fleet, name=job.name or "job", provider=mandate.provider,
        guarantees=provider.guarantees, wanted=wanted_of(job), spec=spec_of(job), rules=rules, labels=job.machine.labels,
        budget=BudgetLimits(
            cap_microusd=cap, max_microusd_h=rules.max_microusd_h, max_nodes=2, slice_s=slice_s or _DEFAULT_SLICE_S
        ),
        deadline_unix_s=deadline_s, work_s=None if deadline_s is None or work_s is None else int(work_s),
        started_unix_s=mandate.started_unix_s,
        changeover_s=changeover_s if changeover_s is not None else provider.guarantees.boot_s + 180,
        retry_exit_codes=codes,
        extras_microusd_h=(extras or extras_of)(provider, spec_of(job), wanted_of(job)),
    )  # fmt: skip
