"""AWS: the instance metadata service (IMDSv2), polled every few seconds.

One poll asks four things at once: spot interruption (`instance-action`), rebalance recommendation, Auto Scaling lifecycle state,
and scheduled maintenance. Each answers for itself: a failure of one hides nothing that the others say. 404: there is none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from holdfast.notice.base import Lookout, Notice, NoticeKind
from holdfast.notice.board import Board
from holdfast.notice.fetch import Fetch, Reply, Unheard
from holdfast.notice.times import clock_skew_s, parse_time_unix_s

__all__ = ["AwsWatcher", "endpoint", "probe"]

_POLL_S = 5.0
_TIMEOUT_S = 2.0
_TOKEN_TTL_S = 21600
_SPOT_LEAD_S = 120.0
_SCALING_LEAD_S = 30.0
"""A scaling group without a lifecycle hook shuts the instance down at once; the system gets this long at least to stop."""
_TOKEN_PATH = "/latest/api/token"
_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN_HEADER = "X-aws-ec2-metadata-token"
_NO_HINT = " (from a container the instance's hop limit must be 2)"


def endpoint(environ: Mapping[str, str]) -> str:
    """Where the metadata service is, by the variables that AWS's own tools read."""
    named = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if named:
        return named
    ipv6 = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
    return "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"


async def probe(fetch: Fetch, timeout_s: float) -> bool:
    """Whether an EC2 metadata service answers there."""
    try:
        reply = await fetch.ask("PUT", _TOKEN_PATH, headers={_TTL_HEADER: "60"}, timeout_s=timeout_s)
    except Unheard:
        return False
    return reply.status == 200 and _is_token(reply.text)


@dataclass(frozen=True, slots=True)
class _Channel:
    source: str
    path: str
    read: Callable[[Reply, float, float], list[Notice]]
    """(answer with status 200, now, seconds between polls) → everything that the channel says. Raises Unheard for garbage."""


class AwsWatcher:
    """Everything that an EC2 instance is told. See `Watcher`."""

    name = "aws"

    def __init__(
        self, at: str, *, poll_s: float = _POLL_S, timeout_s: float = _TIMEOUT_S, token_ttl_s: int = _TOKEN_TTL_S
    ) -> None:
        self._fetch = Fetch(at, timeout_s=timeout_s)
        self._poll_s, self._token_ttl_s = poll_s, token_ttl_s
        self._board = Board()
        self._token: str | None = None
        self._token_until_s = 0.0
        self._asking_token = asyncio.Lock()

    async def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        try:
            while True:
                polls = await asyncio.gather(*(self._poll(channel, lookout) for channel in _CHANNELS))
                for changes in polls:
                    for notice in changes:
                        yield notice
                await lookout.sleep(self._poll_s)
        finally:
            await self._fetch.close()

    async def _poll(self, channel: _Channel, lookout: Lookout) -> list[Notice]:
        try:
            reply = await self._get(channel.path, lookout)
            now_s = lookout.clock.unix_s()
            if reply.status == 404:
                said = []
            elif reply.status == 200:
                said = channel.read(reply, now_s, self._poll_s)
            else:
                raise Unheard(reply.shown())
        except Unheard as silence:
            lookout.trouble(channel.source, str(silence))
            return []
        lookout.well(channel.source)
        return self._board.said(channel.source, said, now_s)

    async def _get(self, path: str, lookout: Lookout) -> Reply:
        """Ask with the token that we have; if it is refused, once more with a new one."""
        token = await self._valid_token(lookout, refused=None)
        reply = await self._fetch.ask("GET", path, headers={_TOKEN_HEADER: token})
        if reply.status == 401:
            token = await self._valid_token(lookout, refused=token)
            reply = await self._fetch.ask("GET", path, headers={_TOKEN_HEADER: token})
        return reply

    async def _valid_token(self, lookout: Lookout, *, refused: str | None) -> str:
        async with self._asking_token:
            # Beside this request another one may have renewed the token that was refused.
            if self._token is None or self._token == refused or lookout.clock.monotonic_s() >= self._token_until_s:
                ttl = str(self._token_ttl_s)
                asked_s = lookout.clock.monotonic_s()
                try:
                    reply = await self._fetch.ask("PUT", _TOKEN_PATH, headers={_TTL_HEADER: ttl})
                except Unheard as silence:
                    raise Unheard(f"no token: {silence}{_NO_HINT}") from None
                if reply.status != 200 or not _is_token(reply.text):
                    raise Unheard(f"no token: {reply.shown()}")
                self._token = reply.text.strip()
                # Renewed well before it runs out, so that no poll is spent on being refused.
                self._token_until_s = asked_s + 0.8 * self._token_ttl_s
            return self._token


def _is_token(text: str) -> bool:
    token = text.strip()
    return 0 < len(token) <= 512 and token.isascii() and token.isprintable() and not set(token) & set(" <>{}")


def _json(reply: Reply) -> object:
    try:
        return json.loads(reply.text)
    except (ValueError, RecursionError):
        raise Unheard(f"not JSON: {reply.shown()}") from None


def _deadline_unix_s(reply: Reply, text: object, now_unix_s: float) -> float | None:
    stated = parse_time_unix_s(text)
    return None if stated is None else stated + clock_skew_s(reply.headers.get("date"), now_unix_s)


def _read_spot(reply: Reply, now_unix_s: float, poll_s: float) -> list[Notice]:
    said = _json(reply)
    if not isinstance(said, dict):
        raise Unheard(f"not an instance action: {reply.shown()}")
    action = said.get("action")
    deadline = _deadline_unix_s(reply, said.get("time"), now_unix_s)
    if action not in ("terminate", "stop", "hibernate") and deadline is None:
        raise Unheard(f"not an instance action: {reply.shown()}")
    assumed = deadline is None
    if action == "hibernate":
        # The one interruption without a warning: it has begun.
        deadline, assumed = now_unix_s, True
    elif deadline is None:
        # The two minutes may have begun right after the previous poll.
        deadline = now_unix_s + _SPOT_LEAD_S - poll_s
    return [
        Notice(
            kind=NoticeKind.PREEMPTION,
            deadline_unix_s=deadline,
            source="aws:spot",
            id="instance-action",
            heard_unix_s=now_unix_s,
            assumed=assumed,
            evidence={"action": str(action)[:64], "time": str(said.get("time"))[:64]},
        )
    ]


def _read_rebalance(reply: Reply, now_unix_s: float, poll_s: float) -> list[Notice]:
    said = _json(reply)
    if not isinstance(said, dict) or not isinstance(said.get("noticeTime"), str):
        raise Unheard(f"not a rebalance recommendation: {reply.shown()}")
    return [
        Notice(
            kind=NoticeKind.REBALANCE,
            deadline_unix_s=None,
            source="aws:rebalance",
            id="rebalance",
            heard_unix_s=now_unix_s,
            evidence={"noticeTime": said["noticeTime"][:64]},
        )
    ]


_STAYING = frozenset(
    {"InService", "Detached", "Standby", "Warmed:Running", "EnteringStandby", "Pending", "Pending:Wait"}
)
_GOING = frozenset({"Terminated", "Warmed:Stopped", "Warmed:Hibernated", "Warmed:Terminated"})


def _read_scaling(reply: Reply, now_unix_s: float, poll_s: float) -> list[Notice]:
    state = reply.text.strip()
    if state in _STAYING:
        return []
    if state not in _GOING:
        raise Unheard(f"not a lifecycle state: {reply.shown()}")
    return [
        Notice(
            kind=NoticeKind.TERMINATION,
            deadline_unix_s=now_unix_s + _SCALING_LEAD_S,
            source="aws:autoscaling",
            id="target-lifecycle-state",
            heard_unix_s=now_unix_s,
            assumed=True,
            evidence={"target-lifecycle-state": state},
        )
    ]


def _read_maintenance(reply: Reply, now_unix_s: float, poll_s: float) -> list[Notice]:
    said = _json(reply)
    if not isinstance(said, list):
        raise Unheard(f"not a list of events: {reply.shown()}")
    notices: list[Notice] = []
    for event in said:
        # One strange entry must not hide the others.
        if not isinstance(event, dict) or event.get("State", "active") != "active":
            continue
        notices.append(
            Notice(
                kind=NoticeKind.MAINTENANCE,
                # Without a readable date it is advice, not silence.
                deadline_unix_s=_deadline_unix_s(reply, event.get("NotBefore"), now_unix_s),
                source="aws:maintenance",
                id=str(event.get("EventId") or event.get("Code"))[:128],
                heard_unix_s=now_unix_s,
                evidence={name: str(event.get(name))[:200] for name in ("Code", "NotBefore", "Description")},
            )
        )
    return notices


_CHANNELS = (
    _Channel("aws:spot", "/latest/meta-data/spot/instance-action", _read_spot),
    _Channel("aws:rebalance", "/latest/meta-data/events/recommendations/rebalance", _read_rebalance),
    _Channel("aws:autoscaling", "/latest/meta-data/autoscaling/target-lifecycle-state", _read_scaling),
    _Channel("aws:maintenance", "/latest/meta-data/events/maintenance/scheduled", _read_maintenance),
)
