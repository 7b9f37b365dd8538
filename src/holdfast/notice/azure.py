"""Azure: scheduled events, polled every second, and the word back that an event may begin.

The list holds the events of every machine in the scale set, so they are filtered by this machine's name. As long as the name is not
known every event is taken as ours, and what turns out to be another machine's is withdrawn: an unnecessary save is cheaper than a
missed one. The service sleeps until it is first asked, and that first call may take two minutes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from holdfast.notice.base import Lookout, Notice, NoticeKind
from holdfast.notice.board import Board
from holdfast.notice.fetch import Fetch, Reply, Unheard
from holdfast.notice.times import clock_skew_s, parse_time_unix_s

__all__ = ["AzureWatcher", "endpoint", "probe"]

SOURCE = "azure:scheduled-events"
_HEADERS = {"Metadata": "true"}
_EVENTS = "/metadata/scheduledevents"
_EVENTS_VERSION = {"api-version": "2020-07-01"}
_INSTANCE = "/metadata/instance/compute"
_INSTANCE_VERSION = {"api-version": "2021-02-01"}
_POLL_S = 1.0
_TIMEOUT_S = 5.0
_FIRST_CALL_S = 150.0
_KINDS = {
    "Preempt": NoticeKind.PREEMPTION,
    "Terminate": NoticeKind.TERMINATION,
    "Reboot": NoticeKind.MAINTENANCE,
    "Redeploy": NoticeKind.MAINTENANCE,
    "Freeze": NoticeKind.MAINTENANCE,
}


def endpoint(environ: Mapping[str, str]) -> str:
    """Where the metadata service is. Azure knows no variable for it, so this one is ours."""
    return environ.get("HOLDFAST_AZURE_METADATA_ENDPOINT") or "http://169.254.169.254"


async def probe(fetch: Fetch, timeout_s: float) -> bool:
    """Whether an Azure metadata service answers there."""
    try:
        reply = await fetch.ask("GET", _INSTANCE, headers=_HEADERS, params=_INSTANCE_VERSION, timeout_s=timeout_s)
        return _name_in(reply) is not None
    except Unheard:
        return False


class AzureWatcher:
    """The scheduled events of this virtual machine. See `Watcher` and `Acknowledges`."""

    name = SOURCE

    def __init__(
        self,
        at: str,
        *,
        poll_s: float = _POLL_S,
        timeout_s: float = _TIMEOUT_S,
        first_call_s: float = _FIRST_CALL_S,
    ) -> None:
        self._at, self._timeout_s = at, timeout_s
        self._fetch = Fetch(at, timeout_s=timeout_s)
        self._poll_s, self._first_call_s = poll_s, first_call_s
        self._board = Board()
        self._own_name: str | None = None
        self._awake = False

    async def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        try:
            while True:
                try:
                    reply = await (self._events() if self._awake else self._first_events(lookout))
                    await self._learn_name(lookout)
                    now_s = lookout.clock.unix_s()
                    said = self._read(reply, now_s)
                except Unheard as silence:
                    lookout.trouble(SOURCE, str(silence))
                else:
                    self._awake = True
                    lookout.well(SOURCE)
                    for notice in self._board.said(SOURCE, said, now_s):
                        yield notice
                await lookout.sleep(self._poll_s)
        finally:
            await self._fetch.close()

    async def _events(self, timeout_s: float | None = None) -> Reply:
        return await self._fetch.ask("GET", _EVENTS, headers=_HEADERS, params=_EVENTS_VERSION, timeout_s=timeout_s)

    async def _first_events(self, lookout: Lookout) -> Reply:
        """One patient request wakes the service; brief ones beside it hear it earlier if just the patient one is stuck."""
        patient = asyncio.ensure_future(self._events(self._first_call_s))
        try:
            while not patient.done():
                brief = asyncio.ensure_future(self._events())
                try:
                    await asyncio.wait({patient, brief}, return_when=asyncio.FIRST_COMPLETED)
                    if brief.done() and brief.exception() is None:
                        return brief.result()
                finally:
                    await _given_up(brief)
                if not patient.done():
                    await lookout.sleep(self._poll_s)
            return patient.result()
        finally:
            await _given_up(patient)

    async def _learn_name(self, lookout: Lookout) -> None:
        if self._own_name is None:
            try:
                # Brief: meanwhile the events are not asked for.
                reply = await self._fetch.ask(
                    "GET", _INSTANCE, headers=_HEADERS, params=_INSTANCE_VERSION, timeout_s=min(1.0, self._timeout_s)
                )
                self._own_name = _name_in(reply)
            except Unheard as silence:
                lookout.trouble("azure:instance", f"the machine's own name: {silence}")

    def _read(self, reply: Reply, now_unix_s: float) -> list[Notice]:
        said = _json(reply)
        events = said.get("Events") if reply.status == 200 and isinstance(said, dict) else None
        if not isinstance(events, list):
            raise Unheard(f"not a list of scheduled events: {reply.shown()}")
        # One strange entry must not hide the others.
        ours = (event for event in events if isinstance(event, dict) and self._is_ours(event))
        notices = (self._notice(event, reply, now_unix_s) for event in ours)
        return [notice for notice in notices if notice is not None]

    def _is_ours(self, event: dict[str, Any]) -> bool:
        return self._own_name is None or self._own_name in _resources(event)

    def _notice(self, event: dict[str, Any], reply: Reply, now_unix_s: float) -> Notice | None:
        type = str(event.get("EventType"))
        id = str(event.get("EventId") or type)[:128]
        if event.get("EventStatus") in ("Completed", "Canceled"):
            return None
        deadline, assumed = self._deadline(id, event, reply, now_unix_s)
        kind = _KINDS.get(type, NoticeKind.MAINTENANCE)
        return Notice(
            kind=kind,
            # A frozen machine goes on after some seconds: nothing is lost.
            deadline_unix_s=None if type == "Freeze" else deadline,
            source=SOURCE,
            id=id,
            heard_unix_s=now_unix_s,
            assumed=assumed and type != "Freeze",
            evidence={
                **{
                    name: str(event.get(name))[:200]
                    for name in ("EventType", "EventStatus", "NotBefore", "EventSource")
                },
                "own_name": self._own_name,
                "resources": len(_resources(event)),
            },
        )

    def _deadline(self, id: str, event: dict[str, Any], reply: Reply, now_unix_s: float) -> tuple[float, bool]:
        """An event that has started has no NotBefore any more: then what was said before holds, or else it is now."""
        stated = parse_time_unix_s(event.get("NotBefore"))
        if stated is not None:
            return stated + clock_skew_s(reply.headers.get("date"), now_unix_s), False
        before = self._board.standing(SOURCE, id)
        if before is not None and before.deadline_unix_s is not None:
            return min(before.deadline_unix_s, now_unix_s), before.assumed
        return now_unix_s, True

    async def acknowledge(self, notice: Notice, lookout: Lookout) -> bool:
        """Let the event begin, if this machine is the only one that it concerns: the word starts it for all of them.

        The list is asked once more first, because resources join and leave an event until it starts.
        """
        fetch = Fetch(self._at, timeout_s=self._timeout_s)
        try:
            reply = await fetch.ask("GET", _EVENTS, headers=_HEADERS, params=_EVENTS_VERSION)
            why_not = self._why_not_alone(notice.id, _json(reply))
            if why_not is None:
                word = json.dumps({"StartRequests": [{"EventId": notice.id}]}).encode()
                headers = {**_HEADERS, "Content-Type": "application/json"}
                answer = await fetch.ask("POST", _EVENTS, headers=headers, params=_EVENTS_VERSION, body=word)
                if answer.status == 200:
                    return True
                why_not = answer.shown()
        except Unheard as silence:
            why_not = str(silence)
        finally:
            await fetch.close()
        lookout.trouble("azure:acknowledge", f"event {notice.id} was not acknowledged: {why_not}")
        return False

    def _why_not_alone(self, id: str, said: object) -> str | None:
        events = said.get("Events") if isinstance(said, dict) else None
        for event in events if isinstance(events, list) else ():
            if isinstance(event, dict) and event.get("EventId") == id:
                if event.get("EventStatus") != "Scheduled":
                    return f"it is {str(event.get('EventStatus'))[:32]} already"
                if self._own_name is None:
                    return "this machine's own name is not known"
                others = len(set(_resources(event)) - {self._own_name})
                if others or event.get("ResourceType") != "VirtualMachine":
                    return f"it concerns {others} other machines too"
                return None if _resources(event) else "it names no machine"
        return "it is not listed any more"


def _resources(event: dict[str, Any]) -> list[str]:
    resources = event.get("Resources")
    return [_bare(name) for name in resources if isinstance(name, str)] if isinstance(resources, list) else []


def _bare(name: str) -> str:
    """Cloud services put an underscore before their instances' names; Azure compares names without regard to case."""
    return name.removeprefix("_").lower()


def _json(reply: Reply) -> object:
    try:
        return json.loads(reply.text)
    except (ValueError, RecursionError):
        raise Unheard(f"not JSON: {reply.shown()}") from None


def _name_in(reply: Reply) -> str | None:
    said = _json(reply)
    if reply.status != 200 or not isinstance(said, dict) or not isinstance(said.get("name"), str) or not said["name"]:
        raise Unheard(f"not a machine's description: {reply.shown()}")
    return _bare(said["name"])


async def _given_up(request: asyncio.Future[Reply]) -> None:
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
