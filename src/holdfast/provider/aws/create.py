"""One launch: the calls of a request, sent once each, and what it means when one of them is refused, lost, or was made before.

    1 DescribeInstances        is there a machine of this token already? Then it is the answer
    2 DescribeLaunchTemplates  is there a template of it? Then this launch has been tried before
    3 CreateLaunchTemplate     unless it is there
    4 CreateFleet              a machine, or a refusal for each pool
    5 DeleteLaunchTemplate     after an answer that settles it

Whoever dies in between leaves at most a template, or a template and a machine; the same request again finds them by 1 and 2,
or gets AWS's recorded answer by the token. A refusal settles a launch only when it is the first try: on a repeated one, throttling,
rights that have run out or a missing subnet say nothing about what the earlier call has made. That is why the template stays
until there is an answer that settles it: it is the mark that a fleet may have been asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError, UsageError
from holdfast.core.failures import Failure
from holdfast.core.launches import Pool
from holdfast.provider.aws.account import Account, Refused, Unanswered
from holdfast.provider.aws.machines import find, machine_of, tags_of
from holdfast.provider.aws.refusals import launch_failed, of_fleet
from holdfast.provider.aws.request import TAG
from holdfast.provider.base import Machine

__all__ = ["create"]

_NO_TEMPLATE = ("InvalidLaunchTemplateName.NotFoundException", "InvalidLaunchTemplateId.NotFound")
_HAS_TEMPLATE = "InvalidLaunchTemplateName.AlreadyExistsException"


def create(account: Account, request: Mapping[str, Any], clock: Clock) -> Machine:
    """LaunchFailed: nothing is there, and nothing will come of it. OutcomeUnknown: repeat it."""
    region = request["region"]
    try:
        machine = _found(account, request)
        if machine is None:
            tried = _has_template(account, request)
    except ProviderError as error:
        if isinstance(error, LaunchFailed):
            raise
        raise OutcomeUnknown(f"nothing was asked for now, and nobody knows about earlier calls: {error}") from error
    if machine is not None:
        _forget_template(account, request)
        return machine
    if clock.unix_s() > request["expires_unix_s"]:
        # AWS forgets tokens after a time that it does not name: an old request must not make a machine that nobody expects.
        _forget_template(account, request)
        raise LaunchFailed("the order has expired, and there is no machine of it", Failure.TIMEOUT)
    try:
        if not tried:
            tried = _make_template(account, region, request["CreateLaunchTemplate"])
        answer = account.once("ec2", region, "CreateFleet", request["CreateFleet"])
    except (Refused, Unanswered) as error:
        return _undecided(account, request, error, tried=tried)
    except UsageError as error:
        raise LaunchFailed(f"the SDK refuses the request: {error}", Failure.BAD_REQUEST) from error
    return _settled(account, request, answer, clock)


def _found(account: Account, request: Mapping[str, Any]) -> Machine | None:
    """The machine that this request has made. LaunchFailed where the token has made one with another request."""
    told = find(account, request["region"], request["token"])
    if not told:
        return None
    for each in told:
        if tags_of(each).get(f"{TAG}request") == request["digest"]:
            return machine_of(each, request["region"], None)
    ids = ", ".join(each["InstanceId"] for each in told)
    raise LaunchFailed(f"token {request['token']} has made {ids} with another request", Failure.BAD_REQUEST)


def _has_template(account: Account, request: Mapping[str, Any]) -> bool:
    name = request["CreateLaunchTemplate"]["LaunchTemplateName"]
    filters = [{"Name": "launch-template-name", "Values": [name]}]
    return bool(
        account.ask_all("ec2", request["region"], "DescribeLaunchTemplates", "LaunchTemplates", Filters=filters)
    )


def _make_template(account: Account, region: str, parameters: Mapping[str, Any]) -> bool:
    """Whether it was there after all."""
    try:
        account.once("ec2", region, "CreateLaunchTemplate", parameters)
    except Refused as error:
        if error.code != _HAS_TEMPLATE:
            raise
        return True
    return False


def _undecided(account: Account, request: Mapping[str, Any], error: Refused | Unanswered, *, tried: bool) -> Machine:
    """A call was refused or lost. What it means depends on whether a fleet may have been asked for."""
    try:
        machine = _found(account, request)
    except LaunchFailed:
        raise
    except ProviderError as second:
        raise OutcomeUnknown(f"{error}; then {second}") from error
    if machine is not None:
        _forget_template(account, request)
        return machine
    if isinstance(error, Unanswered) and error.sent and error.operation == "CreateFleet":
        raise OutcomeUnknown(f"{error}; the same request again says what came of it") from error
    if tried or (isinstance(error, Refused) and error.code in _NO_TEMPLATE):
        raise OutcomeUnknown(f"{error}; this says nothing about an earlier try of this launch") from error
    _forget_template(account, request)
    if isinstance(error, Refused):
        raise launch_failed(error.code, error.said, f"AWS refuses {error.operation}") from error
    raise LaunchFailed(str(error), Failure.ERROR) from error


def _settled(account: Account, request: Mapping[str, Any], answer: Mapping[str, Any], clock: Clock) -> Machine:
    """A fleet has answered, now or when its token was first used."""
    instances, errors = answer.get("Instances") or (), answer.get("Errors") or ()
    if not instances and not errors and answer.get("FleetId"):
        instances, errors = _of_fleet_id(account, request["region"], answer["FleetId"])
    born = [each for each in instances if each.get("InstanceIds")]
    if not born and not errors:
        raise OutcomeUnknown(f"fleet {answer.get('FleetId')} names neither a machine nor an error")
    _forget_template(account, request)
    if not born:
        raise of_fleet(errors)
    return _newborn(account, request, born[0], clock)


def _of_fleet_id(account: Account, region: str, fleet: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """A repeated call may be answered with the fleet alone; an instant fleet is told of when it is named."""
    try:
        told = account.ask("ec2", region, "DescribeFleets", FleetIds=[fleet]).get("Fleets") or [{}]
    except ProviderError as error:
        raise OutcomeUnknown(f"there is a fleet {fleet}, and nobody says what it has launched: {error}") from error
    return told[0].get("Instances") or (), told[0].get("Errors") or ()


def _newborn(account: Account, request: Mapping[str, Any], born: Mapping[str, Any], clock: Clock) -> Machine:
    """As the list tells of it, with the moment from which it is billed; while the list is blind, as the fleet does."""
    region, id = request["region"], born["InstanceIds"][0]
    try:
        told = account.ask("ec2", region, "DescribeInstances", InstanceIds=[id])["Reservations"]
        return machine_of(told[0]["Instances"][0], region, None)
    except (ProviderError, LookupError):
        pass
    overrides = born.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
    subnet = born.get("SubnetId") or overrides.get("SubnetId") or ""
    zone = born.get("AvailabilityZone") or overrides.get("AvailabilityZone") or request["subnets"].get(subnet, "")
    kind = born.get("InstanceType") or overrides.get("InstanceType", "")
    ceilings = {Pool.named(name): ceiling for name, ceiling in request["pools"]}
    pool = next((each for each in ceilings if (each.zone, each.instance_type) == (zone, kind)), next(iter(ceilings)))
    return Machine(
        id=id,
        pool=pool,
        state="pending",
        fleet=request["fleet"],
        run_id=request["run_id"],
        launch=request["launch"],
        token=request["token"],
        microusd_h=ceilings[pool],
        created_unix_s=clock.unix_s(),
        expires_unix_s=request["expires_unix_s"],
    )


def _forget_template(account: Account, request: Mapping[str, Any]) -> None:
    """Nobody needs it any more. If it stays, it is among what is left over."""
    name = request["CreateLaunchTemplate"]["LaunchTemplateName"]
    try:
        account.ask("ec2", request["region"], "DeleteLaunchTemplate", LaunchTemplateName=name)
    except ProviderError:
        pass
