"""One machine's life as the cloud knows it, told by entries of the log: made by `Lives.apply`, and by nothing else.

Times are the cloud's whole seconds for what is billed, and this machine's (CLOCK_MONOTONIC) for what happens to processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from holdfast.core.launches import Pool
from holdfast.provider.base import Leftover, Machine
from holdfast.provider.local.wire import TAG_EXPIRES, TAG_FLEET, TAG_LAUNCH, TAG_RUN, TAG_TOKEN, CreateRequest

__all__ = ["Accepted", "Extra", "Life", "Lives"]

Entry = dict[str, Any]
EndedBy = Literal["provider", "owner", "itself"]


@dataclass(slots=True)
class Accepted:
    """A create call that was taken."""

    token: str
    digest: str
    machine: str
    request: Entry
    due_real_s: float | None
    """When it is carried out, if it has not been."""


@dataclass(slots=True)
class Extra:
    """A disk or an address; it may outlive its machine."""

    kind: str
    id: str
    machine: str
    gib: int
    since_unix_s: int
    removed_unix_s: int | None = None


@dataclass(slots=True)
class _Moment:
    real_s: float
    state: Literal["pending", "running", "ending", "gone"]


@dataclass(slots=True)
class Life:
    """See above. `deadline_real_s`: the provider takes it then."""

    id: str
    request: CreateRequest
    pool: Pool
    ceiling_microusd_h: int
    born_unix_s: int
    boots_real_s: float
    skew_s: float
    expires_unix_s: int
    metadata_port: int = 0
    booted: bool = False
    """A keeper has been started."""
    idle: bool = False
    """It has shut itself down, and is billed on."""
    ends_real_s: float | None = None
    """When its lifetime is over, where the provider enforces it."""
    advice_real_s: float | None = None
    """An advice that will come to nothing."""
    deadline_real_s: float | None = None
    notice_real_s: float | None = None
    withdraw_real_s: float | None = None
    told: bool = False
    spared: bool = False
    """Its notice was withdrawn: it does not count until there is room for all again."""
    ending: EndedBy | None = None
    ended_by: EndedBy | None = None
    gone_unix_s: int | None = None
    moments: list[_Moment] = field(default_factory=list)

    @property
    def is_gone(self) -> bool:
        return self.gone_unix_s is not None

    def machine(self, seen_real_s: float, pool_microusd_h: int) -> Machine | None:
        """As it was then; None: it was not there yet."""
        states = [moment.state for moment in self.moments if moment.real_s <= seen_real_s]
        if not states:
            return None
        tags, gone = self.request.tags, states[-1] == "gone"
        return Machine(
            id=self.id,
            pool=self.pool,
            state=states[-1],
            fleet=tags.get(TAG_FLEET, ""),
            run_id=tags.get(TAG_RUN, ""),
            launch=int(tags.get(TAG_LAUNCH, "0")),
            token=tags.get(TAG_TOKEN, ""),
            microusd_h=min(pool_microusd_h, self.ceiling_microusd_h),
            created_unix_s=float(self.born_unix_s),
            gone_unix_s=None if self.gone_unix_s is None or not gone else float(self.gone_unix_s),
            ended_by=self.ended_by if gone else None,
            expires_unix_s=self.expires_unix_s,
        )


class Lives:
    """Everything that the log says, entry by entry. Thread safety: none; the cloud applies under its lock."""

    def __init__(self) -> None:
        self.accepted: dict[str, Accepted] = {}
        """By machine."""
        self.by_token: dict[str, Accepted] = {}
        self.by_id: dict[str, Life] = {}
        self.extras: dict[str, Extra] = {}
        self.priced: dict[str, tuple[int, int]] = {}
        """Pool → the newest price in the log, and since when."""
        self.market: list[Entry] = []
        """What was set while the cloud ran."""
        self.newest_unix_s = 0

    def there(self) -> list[Life]:
        return [life for life in self.by_id.values() if not life.is_gone]

    def leftovers(self) -> list[Extra]:
        return [
            each for each in self.extras.values() if each.removed_unix_s is None and self.by_id[each.machine].is_gone
        ]

    def extras_of(self, id: str) -> list[Extra]:
        return [each for each in self.extras.values() if each.machine == id]

    def leftover(self, extra: Extra, microusd_h: int) -> Leftover:
        life = self.by_id[extra.machine]
        tags = life.request.tags
        return Leftover(
            kind=extra.kind,
            id=extra.id,
            region=life.pool.region,
            microusd_h=microusd_h,
            expires_unix_s=life.expires_unix_s,
            run_id=tags.get(TAG_RUN, ""),
        )

    def apply(self, entry: Entry) -> None:
        self.newest_unix_s = max(self.newest_unix_s, entry["t"])
        match entry["event"]:
            case "price":
                self.priced[entry["pool"]] = (entry["t"], entry["microusd_h"])
            case "market":
                self.market.append(entry)
            case "accepted":
                names = ("token", "digest", "machine", "request", "due_real_s")
                accepted = Accepted(**{name: entry[name] for name in names})
                self.accepted[accepted.machine] = self.by_token[accepted.token] = accepted
            case "refused":
                self.accepted[entry["machine"]].due_real_s = None
            case "birth":
                self._born(entry)
            case "volume" | "address":
                self.extras[entry["id"]] = Extra(
                    entry["event"], entry["id"], entry["machine"], entry["gib"], entry["t"]
                )
            case "removed":
                self.extras[entry["id"]].removed_unix_s = entry["t"]
            case "opened" | "rules":
                pass
            case _:
                self._lived(self.by_id[entry["machine"]], entry)

    def _born(self, entry: Entry) -> None:
        accepted = self.accepted[entry["machine"]]
        accepted.due_real_s = None
        request = msgspec.convert(accepted.request, CreateRequest)
        life = Life(
            id=entry["machine"],
            request=request,
            expires_unix_s=int(request.tags.get(TAG_EXPIRES, "0")),
            pool=Pool.named(entry["pool"]),
            ceiling_microusd_h=entry["ceiling_microusd_h"],
            born_unix_s=entry["t"],
            boots_real_s=entry["boots_real_s"],
            skew_s=entry["skew_s"],
            ends_real_s=entry["ends_real_s"],
            advice_real_s=entry["advice_real_s"],
        )
        life.moments.append(_Moment(entry["real_s"], "pending"))
        self.by_id[life.id] = life

    def _lived(self, life: Life, entry: Entry) -> None:
        real_s: float = entry["real_s"]
        match entry["event"]:
            case "boot":
                life.booted, life.metadata_port = True, entry["metadata_port"]
                life.moments.append(_Moment(real_s, "running"))
            case "doomed":
                life.deadline_real_s, life.notice_real_s = entry["deadline_real_s"], entry["notice_real_s"]
                life.withdraw_real_s = entry["withdraw_real_s"]
            case "extended":
                life.expires_unix_s = entry["expires_unix_s"]
            case "rebalance":
                life.advice_real_s = None
            case "notice":
                life.told, life.notice_real_s = True, None
            case "withdrawn":
                life.deadline_real_s = life.notice_real_s = life.withdraw_real_s = None
                life.told, life.spared = False, True
            case "counted":
                life.spared = False
            case "ending":
                life.ending = entry["by"]
                life.moments.append(_Moment(real_s, "ending"))
            case "idle":
                life.idle = True
            case "death":
                life.gone_unix_s, life.ended_by = entry["t"], entry["by"]
                life.moments.append(_Moment(real_s, "gone"))
