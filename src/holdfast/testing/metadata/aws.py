"""AWS's instance metadata service, version 2 only, as an instance sees it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, ClassVar

from holdfast.testing.loopback import Answer
from holdfast.testing.metadata.ask import Ask, text_answer
from holdfast.testing.metadata.timeline import Step

__all__ = ["AwsCloud"]

_DATA = "/latest/meta-data/"
_SPOT, _REBALANCE = "spot/instance-action", "events/recommendations/rebalance"
_SCALING, _MAINTENANCE = "autoscaling/target-lifecycle-state", "events/maintenance/scheduled"
_LONGEST_TTL_S = 21600
_NOT_FOUND = '<?xml version="1.0" encoding="iso-8859-1"?>\n<html><head><title>404 - Not Found</title></head></html>\n'


class AwsCloud:
    """See `Cloud`."""

    name = "aws"
    verbs: ClassVar[dict[str, str]] = {
        "preempt": "a spot interruption is announced (lead 120 s)",
        "slide": "its time moves to lead from now",
        "rebalance": "a rebalance recommendation",
        "stop": "the scaling group terminates the instance",
        "maintain": "maintenance is scheduled (lead 1 h)",
        "revoke": "all tokens are forgotten",
        "withdraw": "everything announced is off",
    }

    def __init__(self) -> None:
        self.tokens: dict[str, float] = {}
        """Token → when it runs out."""
        self._issued = 0
        self._interruption: dict[str, str] | None = None
        self._rebalance: str | None = None
        self._lifecycle: str | None = "InService"
        self._maintenance: list[dict[str, str]] = []

    def environment(self, endpoint: str) -> dict[str, str]:
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint}

    def apply(self, step: Step, at_unix_s: float) -> None:
        deadline_unix_s = at_unix_s + (120.0 if step.lead_s is None else step.lead_s)
        match step.do:
            case "preempt" | "slide":
                self._interruption = {"action": "terminate", "time": _iso(deadline_unix_s)}
            case "rebalance":
                self._rebalance = _iso(at_unix_s)
            case "stop":
                self._lifecycle = "Terminated"
            case "maintain":
                due_unix_s = at_unix_s + (3600.0 if step.lead_s is None else step.lead_s)
                id = step.id or f"instance-event-{len(self._maintenance):017x}"
                self._maintenance.append(_maintenance(id, due_unix_s))
            case "revoke":
                self.tokens.clear()
            case "withdraw":
                self._interruption = self._rebalance = None
                self._lifecycle = "InService"
                self._maintenance = [{**event, "State": "canceled"} for event in self._maintenance]

    def answer(self, ask: Ask, now_unix_s: float, waited_s: float) -> Answer | None:
        if "x-forwarded-for" in ask.headers:
            return text_answer(403, "")
        if ask.path == "/latest/api/token":
            return self._token(ask, now_unix_s)
        if ask.method != "GET":
            return text_answer(405, "")
        token = ask.headers.get("x-aws-ec2-metadata-token")
        if token is None or self.tokens.get(token, 0.0) <= now_unix_s:
            return text_answer(401, "")
        if not ask.path.startswith(_DATA):
            return text_answer(404, _NOT_FOUND, type="text/html")
        found = self._value(ask.path.removeprefix(_DATA).rstrip("/"))
        return text_answer(404, _NOT_FOUND, type="text/html") if found is None else text_answer(200, found)

    def _token(self, ask: Ask, now_unix_s: float) -> Answer:
        ttl = ask.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if ask.method != "PUT":
            return text_answer(405, "")
        if not (ttl.isascii() and ttl.isdigit() and 1 <= int(ttl) <= _LONGEST_TTL_S):
            return text_answer(400, "Bad Request")
        self._issued += 1
        token = f"AQAEA{self._issued:049d}=="
        self.tokens[token] = now_unix_s + int(ttl)
        return text_answer(200, token, ("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", ttl))

    def _value(self, path: str) -> str | None:
        values: dict[str, Any] = {
            _SPOT: self._interruption and json.dumps(self._interruption),
            "spot/termination-time": self._interruption and self._interruption["time"],
            _REBALANCE: self._rebalance and json.dumps({"noticeTime": self._rebalance}),
            _SCALING: self._lifecycle,
            _MAINTENANCE: json.dumps([event for event in self._maintenance if event["State"] == "active"]),
            "events/maintenance/history": json.dumps([e for e in self._maintenance if e["State"] != "active"]),
            "instance-id": "i-0123456789abcdef0",
            "instance-type": "p4d.24xlarge",
            "instance-life-cycle": "spot",
            "placement/availability-zone": "us-east-1a",
            "placement/region": "us-east-1",
        }
        return values.get(path)


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _maintenance(id: str, due_unix_s: float) -> dict[str, str]:
    """Dates here are not ISO: `21 Jan 2019 09:00:43 GMT`."""
    written = datetime.fromtimestamp(due_unix_s, UTC)
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    date = f"{written.day} {months[written.month - 1]} {written:%Y %H:%M:%S} GMT"
    return {
        "NotBefore": date, "NotAfter": date, "NotBeforeDeadline": date, "Code": "system-reboot",
        "Description": "scheduled reboot", "EventId": id, "State": "active",
    }  # fmt: skip
