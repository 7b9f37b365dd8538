"""Azure's metadata service, as a virtual machine in a scale set sees it: its own events and those of others."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from holdfast.testing.loopback import Answer
from holdfast.testing.metadata.ask import Ask, http_date, text_answer
from holdfast.testing.metadata.timeline import Step

__all__ = ["AzureCloud"]

_EVENTS, _COMPUTE = "/metadata/scheduledevents", "/metadata/instance/compute"
_TYPES = {"preempt": "Preempt", "stop": "Terminate", "maintain": "Reboot", "freeze": "Freeze"}
_LEAD_S = {"preempt": 30.0, "stop": 300.0, "maintain": 900.0, "freeze": 900.0}
_STARTED_S = 5.0
"""How long an event that has started is still listed."""


class AzureCloud:
    """See `Cloud`."""

    name = "azure"
    verbs: ClassVar[dict[str, str]] = {
        "preempt": "this machine is evicted (lead 30 s)",
        "others": "another machine is evicted",
        "shared": "this machine and another one are evicted together",
        "stop": "the machine is deleted (lead 5 min)",
        "maintain": "the machine is restarted (lead 15 min)",
        "freeze": "the machine pauses for some seconds (lead 15 min)",
        "slide": "NotBefore of the event moves to lead from now",
        "start": "the event has started: it has no NotBefore any more",
        "withdraw": "the event is cancelled",
    }

    def __init__(
        self, *, own_name: str = "trainer_0", other_name: str = "trainer_1", first_call_s: float = 0.0
    ) -> None:
        self.own_name, self._other_name = own_name, other_name
        self._first_call_s = first_call_s
        """How long the service takes to wake up, counted from the first call."""
        self._awake = first_call_s <= 0
        self._incarnation = 1
        self._events: dict[str, dict[str, Any]] = {}
        self._gone_unix_s: dict[str, float] = {}
        self.acknowledged: list[str] = []
        """Events that a StartRequest has named."""

    def environment(self, endpoint: str) -> dict[str, str]:
        return {"HOLDFAST_AZURE_METADATA_ENDPOINT": endpoint}

    def apply(self, step: Step, at_unix_s: float) -> None:
        self._incarnation += 1
        chosen = [id for id in self._events if step.id in (None, id)]
        match step.do:
            case "preempt" | "stop" | "maintain" | "freeze":
                self._schedule(step, step.do, [self.own_name], at_unix_s)
            case "others":
                self._schedule(step, "preempt", [self._other_name], at_unix_s)
            case "shared":
                self._schedule(step, "preempt", [self.own_name, self._other_name], at_unix_s)
            case "slide":
                for id in chosen:
                    lead_s = 30.0 if step.lead_s is None else step.lead_s
                    self._events[id]["NotBefore"] = http_date(at_unix_s + lead_s)
            case "start":
                for id in chosen:
                    self._start(id, at_unix_s)
            case "withdraw":
                for id in chosen:
                    self._events.pop(id)

    def _schedule(self, step: Step, what: str, resources: list[str], at_unix_s: float) -> None:
        id = step.id or f"{0xE5A1B2C3 + self._incarnation:08X}-0000-4000-8000-000000000000"
        lead_s = _LEAD_S[what] if step.lead_s is None else step.lead_s
        self._events[id] = {
            "EventId": id, "EventStatus": "Scheduled", "EventType": _TYPES[what], "ResourceType": "VirtualMachine",
            "Resources": resources, "NotBefore": http_date(at_unix_s + lead_s), "Description": "",
            "EventSource": "Platform", "DurationInSeconds": 9 if what == "freeze" else -1,
        }  # fmt: skip

    def _start(self, id: str, at_unix_s: float) -> None:
        self._events[id] |= {"EventStatus": "Started", "NotBefore": ""}
        self._gone_unix_s[id] = at_unix_s + _STARTED_S

    def answer(self, ask: Ask, now_unix_s: float, waited_s: float) -> Answer | None:
        if ask.headers.get("metadata", "").lower() != "true":
            return _error("Bad request. Required metadata header not specified")
        if "x-forwarded-for" in ask.headers:
            return _error("Bad request. Requests must not contain X-Forwarded-For")
        if "api-version" not in ask.query:
            return _error("Bad request. api-version was not specified in the request")
        if ask.path == _COMPUTE and ask.method == "GET":
            return _json(
                {"name": self.own_name, "vmScaleSetName": "trainer", "location": "westeurope", "priority": "Spot"}
            )
        if ask.path != _EVENTS:
            return text_answer(404, '{"error":"Not found"}', type="application/json")
        if not self._awake and waited_s < self._first_call_s:
            return None
        self._awake = True
        return self._start_requests(ask, now_unix_s) if ask.method == "POST" else self._listing(now_unix_s)

    def _listing(self, now_unix_s: float) -> Answer:
        for id in [id for id, gone_unix_s in self._gone_unix_s.items() if gone_unix_s <= now_unix_s]:
            del self._gone_unix_s[id]
            self._events.pop(id, None)
            self._incarnation += 1
        return _json({"DocumentIncarnation": self._incarnation, "Events": list(self._events.values())})

    def _start_requests(self, ask: Ask, now_unix_s: float) -> Answer:
        try:
            ids = [str(request["EventId"]) for request in json.loads(ask.body)["StartRequests"]]
        except (ValueError, KeyError, TypeError):
            return _error("Bad request. The body is not a list of StartRequests")
        if not set(ids) <= set(self._events):
            return _error("Bad request. No such event")
        for id in ids:
            self.acknowledged.append(id)
            self._incarnation += 1
            self._start(id, now_unix_s)
        return text_answer(200, "")


def _json(value: object) -> Answer:
    return text_answer(200, json.dumps(value), type="application/json; charset=utf-8")


def _error(text: str) -> Answer:
    return text_answer(400, json.dumps({"error": text}), type="application/json")
