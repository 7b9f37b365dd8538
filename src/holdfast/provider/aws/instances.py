"""`AwsInstances`: what holdfast needs of a cloud, from one AWS account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import UsageError
from holdfast.provider.aws import create as launching
from holdfast.provider.aws import machines as listing
from holdfast.provider.aws.account import Account
from holdfast.provider.aws.bill import bill_of, extras_microusd_h
from holdfast.provider.aws.facts import Known
from holdfast.provider.aws.offers import Survey, survey
from holdfast.provider.aws.preflight import preflight
from holdfast.provider.aws.prices import Prices, PriceTable
from holdfast.provider.aws.request import extras_tag, in_one_region, plan_request
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

__all__ = ["AwsInstances"]

_GUARANTEES = Guarantees(
    honours_tokens=True,
    shutdown_terminates=True,
    enforces_lifetime=False,
    tags_at_birth=True,
    list_delay_s=300,
    notice_s=120,
    minimum_s=60,
    boot_s=180,
    stop_s=120,
)
_METADATA = "http://169.254.169.254/latest"
_TOKEN = f"curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' {_METADATA}/api/token"
_BOOT_FACTS = BootFacts(
    end_command="shutdown -h now",
    machine_command=f'curl -sf -H "X-aws-ec2-metadata-token: $({_TOKEN})" {_METADATA}/meta-data/instance-id',
)


class AwsInstances:
    """Machines of one account in these regions. An `Instances`; see there for what it promises.

    Thread safety: every method, from any thread. Ownership: it keeps connections; `close` ends them, and so does a `with` block.
    """

    name = "aws"
    guarantees = _GUARANTEES
    boot_facts = _BOOT_FACTS

    def __init__(
        self,
        regions: Sequence[str],
        *,
        prices: PriceTable | None = None,
        run_url: str | None = None,
        session: Any = None,
        endpoint: str | None = None,
        answer_within_s: float = 120.0,
        clock: Clock | None = None,
    ) -> None:
        """`prices`: the user's own, in dollars (see `prices.py`). `run_url`: for the preflight. `session`: a boto3 session, else
        the environment's. `endpoint`: of an emulator. `answer_within_s`: so long a create call may take, then its outcome is
        unknown."""
        if not regions:
            raise UsageError("aws needs at least one region, like us-east-1")
        self.regions = tuple(dict.fromkeys(regions))
        self.clock: Clock = clock or SystemClock()
        self.account = Account(session=session, endpoint=endpoint, answer_within_s=answer_within_s)
        self._known = Known(self.account)
        self._prices = Prices(self.account, self.clock, prices)
        self._run_url = run_url
        self._extras: dict[str, str] = {}
        self._heard_gone: dict[str, float] = {}

    def __enter__(self) -> AwsInstances:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.account.close()

    def offers(self, wanted: Wanted) -> list[Offer]:
        return list(self.survey(wanted).offers)

    def survey(self, wanted: Wanted) -> Survey:
        """The offers, and what fits and is not offered, with the reasons."""
        if unknown := [each for each in wanted.regions if each not in self.regions]:
            raise UsageError(
                f"{', '.join(unknown)} is not among the regions of this account: {', '.join(self.regions)}"
            )
        return survey(self.account, self._known, self._prices, wanted.regions or self.regions, wanted)

    def extras_microusd_h(self, spec: MachineSpec, region: str) -> int:
        """The most that a machine's disk and public address cost beside it. ProviderError where a price is not known."""
        return extras_microusd_h(extras_tag(spec), region, self._prices)

    def request(self, order: Order) -> dict[str, Any]:
        """Pure but for what must be known first: instance types and the image, asked once in the life of this object."""
        return plan_request(order, self._known.for_pools(in_one_region(order), order.spec.image))

    def create(self, request: Mapping[str, Any]) -> Machine:
        return launching.create(self.account, request, self.clock)

    def machines(self, fleet: str, run_id: str | None = None) -> list[Machine]:
        return listing.machines(self.account, self._prices, self.regions, fleet, run_id)

    def bill(self, machine: Machine) -> Bill:
        now_unix_s = self.clock.unix_s()
        if machine.state == "gone" and machine.gone_unix_s is None:
            # AWS did not say when: the first that was heard of it, at the latest.
            machine = replace(machine, gone_unix_s=self._heard_gone.setdefault(machine.id, now_unix_s))
        extras = self._extras.get(machine.id)
        if extras is None:
            extras = self._extras[machine.id] = listing.extras_of(self.account, machine)
        return bill_of(machine, extras, self._prices, now_unix_s)

    def extend(self, machine: Machine, expires_unix_s: int) -> None:
        listing.extend(self.account, machine, expires_unix_s)

    def terminate(self, machines: Sequence[Machine]) -> None:
        listing.terminate(self.account, machines)

    def leftovers(self, fleet: str) -> list[Leftover]:
        return listing.leftovers(self.account, self._prices, self.regions, fleet)

    def remove(self, leftovers: Sequence[Leftover]) -> None:
        listing.remove(self.account, leftovers)

    def preflight(self, order: Order) -> list[Check]:
        pools = in_one_region(order)
        return preflight(
            self.account,
            order,
            lambda: self._known.for_pools(pools, order.spec.image),
            lambda: self.request(order),
            self._run_url,
        )
