"""Google Cloud: three keys of the metadata server, each by its own long poll.

`preempted`, `maintenance-event` and `shutdown-details/stop-state` say what happens but not when, so every deadline is the least
time that Google gives. A long poll ends after a few seconds even without news: so long can a server stall unnoticed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from holdfast.notice.base import Lookout, Notice, NoticeKind
from holdfast.notice.board import Board
from holdfast.notice.fetch import Fetch, Reply, Unheard

__all__ = ["GcpWatcher", "endpoint", "probe", "watchers"]

_FLAVOR = {"Metadata-Flavor": "Google"}
_ROOT = "/computeMetadata/v1/instance/"
_PREEMPTION_LEAD_S = 30.0
_MAINTENANCE_LEAD_S = 60.0
_STOP_LEAD_S = 30.0
"""A graceful shutdown lasts what the user has set (1 s to 1 h, by default 10 min), which the key does not say; what always
remains is the time that the system gets to shut down."""
_WAIT_S = 5.0
_TIMEOUT_S = 2.0
_RETRY_S = 1.0
_MISSING_POLL_S = 5.0


def endpoint(environ: Mapping[str, str]) -> str:
    """Where the metadata server is, by the variable that Google's own libraries read. By address: a name could not be resolved
    just when it matters."""
    host = environ.get("GCE_METADATA_HOST") or "169.254.169.254"
    return host if "://" in host else f"http://{host}"


async def probe(fetch: Fetch, timeout_s: float) -> bool:
    """Whether a Google metadata server answers there."""
    try:
        reply = await fetch.ask("GET", "/computeMetadata/v1/", headers=_FLAVOR, timeout_s=timeout_s)
    except Unheard:
        return False
    return reply.status == 200 and reply.headers.get("metadata-flavor") == "Google"


@dataclass(frozen=True, slots=True)
class _Meaning:
    kind: NoticeKind
    lead_s: float | None


@dataclass(frozen=True, slots=True)
class _Key:
    source: str
    path: str
    quiet: frozenset[str]
    meanings: Mapping[str, _Meaning]
    may_be_missing: bool = False
    """Whether 404 means that there is nothing to say."""


def _keys(preemption_lead_s: float) -> tuple[_Key, ...]:
    stop = _Meaning(NoticeKind.TERMINATION, _STOP_LEAD_S)
    return (
        _Key(
            "gcp:preempted",
            "preempted",
            frozenset({"FALSE"}),
            {"TRUE": _Meaning(NoticeKind.PREEMPTION, preemption_lead_s)},
        ),
        _Key(
            "gcp:maintenance-event",
            "maintenance-event",
            frozenset({"NONE"}),
            {
                "TERMINATE_ON_HOST_MAINTENANCE": _Meaning(NoticeKind.MAINTENANCE, _MAINTENANCE_LEAD_S),
                "MIGRATE_ON_HOST_MAINTENANCE": _Meaning(NoticeKind.MAINTENANCE, None),
            },
        ),
        _Key(
            "gcp:stop-state",
            "shutdown-details/stop-state",
            frozenset({"", "NONE", "UNSPECIFIED", "UNDEFINED_STOP_STATE"}),
            {"PENDING_STOP": stop, "STOPPING": stop},
            may_be_missing=True,
        ),
    )


class GcpWatcher:
    """One key of the metadata server. See `Watcher`."""

    def __init__(self, at: str, key: _Key, *, wait_s: float, timeout_s: float, retry_s: float) -> None:
        self.name = key.source
        self._fetch = Fetch(at, timeout_s=timeout_s)
        self._key = key
        self._wait_s, self._timeout_s, self._retry_s = wait_s, timeout_s, retry_s
        self._board = Board()

    async def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        etag: str | None = None
        try:
            while True:
                asked_s = lookout.clock.monotonic_s()
                try:
                    reply = await self._ask(etag)
                    now_s = lookout.clock.unix_s()
                    said = self._read(reply, now_s)
                except Unheard as silence:
                    lookout.trouble(self.name, str(silence))
                    # The next answer must come at once, whatever has changed meanwhile.
                    etag = None
                    await lookout.sleep(self._retry_s)
                    continue
                lookout.well(self.name)
                for notice in self._board.said(self.name, said, now_s):
                    yield notice
                before, etag = etag, None if reply.status == 404 else reply.headers.get("etag")
                if etag is None:
                    await lookout.sleep(_MISSING_POLL_S if reply.status == 404 else self._retry_s)
                elif etag == before and lookout.clock.monotonic_s() - asked_s < self._wait_s / 2:
                    # The server does not wait for changes.
                    await lookout.sleep(self._retry_s)
        finally:
            await self._fetch.close()

    async def _ask(self, etag: str | None) -> Reply:
        path = _ROOT + self._key.path
        if etag is None:
            return await self._fetch.ask("GET", path, headers=_FLAVOR)
        wait = {"wait_for_change": "true", "last_etag": etag, "timeout_sec": f"{self._wait_s:g}"}
        return await self._fetch.ask(
            "GET", path, headers=_FLAVOR, params=wait, timeout_s=self._wait_s + self._timeout_s
        )

    def _read(self, reply: Reply, now_unix_s: float) -> list[Notice]:
        if reply.status == 404 and self._key.may_be_missing:
            return []
        value = reply.text.strip()
        if reply.status != 200 or (value not in self._key.quiet and value not in self._key.meanings):
            raise Unheard(f"not a value of {self._key.path}: {reply.shown()}")
        meaning = self._key.meanings.get(value)
        if meaning is None:
            return []
        return [
            Notice(
                kind=meaning.kind,
                deadline_unix_s=None if meaning.lead_s is None else now_unix_s + meaning.lead_s,
                source=self._key.source,
                id=self._key.path,
                heard_unix_s=now_unix_s,
                assumed=meaning.lead_s is not None,
                evidence={self._key.path: value},
            )
        ]


def watchers(
    at: str,
    *,
    preemption_lead_s: float = _PREEMPTION_LEAD_S,
    wait_s: float = _WAIT_S,
    timeout_s: float = _TIMEOUT_S,
    retry_s: float = _RETRY_S,
) -> list[GcpWatcher]:
    """A watcher for each key. `preemption_lead_s`: what instances with a longer preemption notice have been promised."""
    return [
        GcpWatcher(at, key, wait_s=wait_s, timeout_s=timeout_s, retry_s=retry_s) for key in _keys(preemption_lead_s)
    ]
