"""AWS as it is where moto is not: a proxy in front of moto's server that remembers tokens, refuses, loses and delays.

moto forgets tokens, always finds capacity, and knows nothing of prices and quotas. What came over the wire is kept, because moto
drops a part of it (HttpTokens, the shutdown behaviour).
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from threading import Event, RLock
from typing import Any
from urllib.parse import parse_qsl

from holdfast.testing.loopback import Answer, Request, forward, listening, reply

XML = (("Content-Type", "text/xml"),)
JSON = (("Content-Type", "application/x-amz-json-1.1"),)
REMEMBERED = ("CreateFleet", "CreateLaunchTemplate")
_STAYS = ("DescribeImages", "DescribeInstanceTypeOfferings", "DescribeInstanceTypes", "GetParameter")
_STAYED: dict[str, Answer] = {}
"""Answers that are the same for ever: moto takes up to a second for one."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, as it came over the wire."""

    service: str
    region: str
    action: str
    parameters: dict[str, Any]

    def under(self, prefix: str) -> dict[str, str]:
        """The parameters below this one."""
        dotted = f"{prefix}."
        return {key.removeprefix(dotted): value for key, value in self.parameters.items() if key.startswith(dotted)}

    def tags(self, prefix: str) -> dict[str, dict[str, str]]:
        """`TagSpecification`s, by resource."""
        found: dict[str, dict[str, str]] = {}
        for number in range(1, 10):
            one = self.under(f"{prefix}.{number}")
            if "ResourceType" in one:
                count = sum(key.endswith(".Key") for key in one)
                pairs = {one[f"Tag.{n}.Key"]: one[f"Tag.{n}.Value"] for n in range(1, count + 1)}
                found[one["ResourceType"]] = pairs
        return found


@dataclass(frozen=True, slots=True)
class Fault:
    """`applied`: moto gets it. Then `answer`, or a reset connection, or (`stalls`) nothing at all."""

    applied: bool = False
    answer: Answer | None = None
    stalls: bool = False


LOST = Fault(applied=True)
RESET = Fault()
STALLED = Fault(stalls=True)


def refusal(code: str, said: str = "injected", status: int = 400) -> Answer:
    error = f"<Error><Code>{code}</Code><Message>{said}</Message></Error>"
    body = f"<?xml version='1.0'?><Response><Errors>{error}</Errors><RequestID>r-1</RequestID></Response>"
    return Answer(status, XML, body.encode())


THROTTLED = Fault(answer=refusal("RequestLimitExceeded", "Request limit exceeded.", 503))
INTERNAL_AFTER = Fault(applied=True, answer=refusal("InternalError", "An internal error has occurred", 500))

Plan = Callable[[Call, int], Fault | None]


@dataclass(slots=True)
class Front:
    """A running proxy. Everything may be changed between calls."""

    behind: str
    endpoint: str = ""
    plan: Plan = lambda call, repeat: None
    log: list[Call] = field(default_factory=list)
    fleet_errors: list[tuple[str, str]] = field(default_factory=list)
    """A fleet that is asked for now gets these, pool by pool, and no machine."""
    repeats_with_instances: bool = True
    """False: the answer to a repeated CreateFleet names the fleet only."""
    validates_first: bool = False
    """True: a repeated CreateFleet is refused when its template is gone, before its token is looked at."""
    blind: set[str] = field(default_factory=set)
    """Actions whose lists are empty."""
    rewrite: Callable[[Call, bytes], bytes] = lambda call, body: body
    prices: dict[str, str] = field(default_factory=dict)
    """By instance type, disk type or `address`."""
    quotas: dict[str, float] = field(default_factory=dict)
    """By code; others are 1,000."""
    images: dict[str, str] = field(default_factory=dict)
    """Public parameters that moto does not have, and those which stand in for them."""
    _tokens: dict[tuple[str, str, str], tuple[dict[str, Any], Answer]] = field(default_factory=dict)
    _seen: Counter[str] = field(default_factory=Counter)
    _lock: RLock = field(default_factory=RLock)

    def calls(self, action: str) -> list[Call]:
        return [call for call in self.log if call.action == action]

    def reset(self) -> None:
        """As new, at the same address."""
        for each in fields(self):
            if each.name not in ("behind", "endpoint", "_lock"):
                setattr(self, each.name, each.default if each.default_factory is MISSING else each.default_factory())

    def forget(self) -> None:
        """Count and log from now on."""
        self.log.clear()
        self._seen.clear()

    def arrived(self, request: Request, body: bytes) -> tuple[Call, Fault | None]:
        call = _call(request, body)
        with self._lock:
            fault = self.plan(call, self._seen[call.action])
            self._seen[call.action] += 1
            self.log.append(call)
        return call, fault

    def answer(self, call: Call, request: Request, body: bytes) -> Answer:
        token = call.parameters.get("ClientToken")
        if call.action in REMEMBERED and "DryRun" not in call.parameters:
            assert token, f"{call.action} came without a token"
            with self._lock:
                return self._by_token(call, str(token), request, body)
        if call.action in self.blind:
            return _empty(call.action)
        made_up = self._made_up(call)
        if made_up is not None:
            return made_up
        if call.action not in _STAYS:
            answer = self._moto(request, body)
            return Answer(answer.status, answer.headers, self.rewrite(call, answer.body))
        key = json.dumps([call.region, call.action, call.parameters])
        if key not in _STAYED:
            named = call.parameters.get("Name")
            asked = json.dumps({"Name": self.images[named]}).encode() if named in self.images else body
            _STAYED[key] = self._moto(request, asked)
        return _STAYED[key]

    def _by_token(self, call: Call, token: str, request: Request, body: bytes) -> Answer:
        key = (call.region, call.action, token)
        if key in self._tokens:
            first, answer = self._tokens[key]
            if first != call.parameters:
                return refusal("IdempotentParameterMismatch", "the token was used with other parameters")
            if call.action == "CreateFleet" and self.validates_first and not self._has_template(call, request):
                return refusal("InvalidLaunchTemplateName.NotFoundException", "no such template")
            if call.action == "CreateFleet" and not self.repeats_with_instances:
                named = re.sub(rb"<fleetInstanceSet>.*</fleetInstanceSet>", b"", answer.body, flags=re.DOTALL)
                return Answer(answer.status, answer.headers, named)
            return answer
        answer = self._fleet_errors(call) or self._moto(request, body)
        if answer.status == 200:
            self._tokens[key] = (call.parameters, answer)
        return answer

    def _has_template(self, call: Call, request: Request) -> bool:
        name = call.parameters["LaunchTemplateConfigs.1.LaunchTemplateSpecification.LaunchTemplateName"]
        asked = f"Action=DescribeLaunchTemplates&Version=2016-11-15&LaunchTemplateName.1={name}".encode()
        return b"<launchTemplateName>" in self._moto(request, asked).body

    def _moto(self, request: Request, body: bytes) -> Answer:
        return forward(self.behind, request.command, request.path, request.headers.items(), body)

    def _fleet_errors(self, call: Call) -> Answer | None:
        if call.action != "CreateFleet":
            return None
        errors = list(self.fleet_errors)
        pools = call.under("LaunchTemplateConfigs.1.Overrides")
        count = len({key.split(".")[0] for key in pools})
        zones = [pools.get(f"{number}.AvailabilityZone") for number in range(1, count + 1)]
        if not errors and all(zone and not re.fullmatch(call.region + "[a-f]", zone) for zone in zones):
            errors = [("InvalidParameterValue", "no such Availability Zone")]
        if not errors:
            return None
        items = []
        for number in range(1, count + 1):
            code, said = errors[(number - 1) % len(errors)]
            kind = f"<instanceType>{pools[f'{number}.InstanceType']}</instanceType>"
            override = f"<launchTemplateAndOverrides><overrides>{kind}</overrides></launchTemplateAndOverrides>"
            told = f"<errorCode>{code}</errorCode><errorMessage>{said}</errorMessage>"
            items.append(f"<item>{override}<lifecycle>spot</lifecycle>{told}</item>")
        body = f"<fleetId>fleet-0</fleetId><errorSet>{''.join(items)}</errorSet><fleetInstanceSet/>"
        return Answer(200, XML, f"<CreateFleetResponse>{body}</CreateFleetResponse>".encode())

    def _made_up(self, call: Call) -> Answer | None:
        if call.service == "pricing":
            return self._price_list(call)
        if call.service == "servicequotas":
            code = call.parameters["QuotaCode"]
            quota = {"QuotaCode": code, "QuotaName": f"quota {code}", "Value": self.quotas.get(code, 1000.0)}
            return Answer(200, JSON, json.dumps({"Quota": quota}).encode())
        return None

    def _price_list(self, call: Call) -> Answer:
        filters = {each["Field"]: each["Value"] for each in call.parameters["Filters"]}
        if "instanceType" in filters:
            names, unit = filters["instanceType"].split(","), "Hrs"
        else:
            names = [filters.get("volumeApiName", "address")]
            unit = "GB-Mo" if "volumeApiName" in filters else "Hrs"
        products = []
        for name in names:
            if name in self.prices:
                dimension = {"unit": unit, "pricePerUnit": {"USD": self.prices[name]}}
                term = {"priceDimensions": {"d": dimension}}
                attributes = {"instanceType": name}
                products.append(json.dumps({"product": {"attributes": attributes}, "terms": {"OnDemand": {"t": term}}}))
        return Answer(200, JSON, json.dumps({"PriceList": products}).encode())


@contextmanager
def ec2_front(behind: str) -> Iterator[Front]:
    front, closing = Front(behind), Event()

    def handle(request: Request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        call, fault = front.arrived(request, body)
        answer = front.answer(call, request, body) if fault is None or fault.applied else None
        if fault is not None:
            if fault.stalls:
                closing.wait()
            answer = fault.answer
        if answer is None:
            _reset(request)
        else:
            reply(request, answer)

    with listening(handle) as front.endpoint:
        try:
            yield front
        finally:
            closing.set()


def _call(request: Request, body: bytes) -> Call:
    scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/", request.headers.get("Authorization", ""))
    region, service = (scope[1], scope[2]) if scope else ("", "")
    target = request.headers.get("X-Amz-Target")
    if target is not None:
        return Call(service, region, target.rpartition(".")[2], json.loads(body or b"{}"))
    parameters = dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    return Call(service, region, parameters.pop("Action", f"{request.command} {request.path}"), parameters)


def _empty(action: str) -> Answer:
    inside = "<reservationSet/>" if action == "DescribeInstances" else "<launchTemplates/>"
    return Answer(200, XML, f"<{action}Response>{inside}</{action}Response>".encode())


def _reset(request: Request) -> None:
    """Close with RST, as a host that has vanished does."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())
    request.close_connection = True
