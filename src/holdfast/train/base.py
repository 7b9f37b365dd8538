"""`Run(url, base=…)`: which other run is meant, and what its base may cost or save this one.

A base only spares sending: the script loads its weights as it likes. So a base that cannot be used stops a run that has nothing yet
(a typo must not silently send terabytes), and is a warning for one that goes on from its own checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.retain import StoreOpener
from holdfast.checkpoint.runs.base import Adopted, adopt_base, relies_on
from holdfast.checkpoint.runs.inspect import current_checkpoints
from holdfast.checkpoint.runs.pins import are_out_of_reach
from holdfast.checkpoint.saver import Saver
from holdfast.core.errors import Fenced, HoldfastError, UsageError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.store.open import normalise_url
from holdfast.train.ranks.together import Together
from holdfast.train.record import Record

__all__ = ["Base", "choose_base", "share_base", "take_base", "tell_of_no_use"]

_AT_STEP = re.compile(r"(.+)@(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Base:
    """Another run whose unchanged tensors are referred to, and which checkpoint of it: a step, or "latest"."""

    url: str
    step: str


def choose_base(text: str, url: str) -> Base:
    """`URL` or `URL@STEP`. A folder whose own name ends like a step is given with a slash at its end.

    Raises UsageError where the run at `url` cannot refer to it.
    """
    at_step = _AT_STEP.fullmatch(text)
    base = Base(normalise_url(at_step[1]), at_step[2]) if at_step else Base(normalise_url(text), "latest")
    if base.url == url:
        raise UsageError(
            f"{url}: a run is no base of its own; what its own checkpoints hold is never sent again anyway"
        )
    if are_out_of_reach(base.url, url):
        raise UsageError(
            f"{url} cannot refer to its base {base.url}: one of them is a folder that other machines do not see, and the base must "
            "be able to ask what is still needed. Put both on stores of one kind, or leave base= out"
        )
    return base


def take_base(
    base: Base,
    store: Store,
    lineage: Lineage,
    saver: Saver,
    *,
    open_home: StoreOpener,
    tokens: TokenSource,
    record: Record,
) -> Adopted | None:
    """Let the first save refer to the base: pin it there, before anything else uses the lineage.

    None when the run's newest checkpoint refers to the base already, or goes on without it. Raises what `adopt_base` says, for a
    run that has no checkpoint of its own yet.
    """
    where = open_home(base.url)
    if relies_on(lineage.head, saver.roots, where.url):
        return None
    try:
        adopted = adopt_base(
            store, where, base.step, lineage, roots=saver.roots, open_home=open_home, tokens=tokens, warn=record.warn
        )
    except Fenced:
        raise
    except HoldfastError as error:
        if not current_checkpoints(lineage.head):
            raise
        record.warn(f"the base is not used in this attempt, which goes on from this run's own checkpoint: {error}")
        return None
    saver.known.add_base(adopted.parts, adopted.home, adopted.keys)
    record.say(f"{base.url}: what is the same as in step {adopted.ref.step} of this base is referred to and not sent")
    record.emit("base.adopted", base=where.url, checkpoint=adopted.ref.name, step=adopted.ref.step)
    return adopted


def tell_of_no_use(adopted: Adopted, base: Base, lineage: Lineage, record: Record) -> None:
    """After the first save: say it when that had nothing in common with the base."""
    if adopted.keys.keys() & {pin.home for pin in lineage.head.pins}:
        return
    message = (
        f"{base.url}: the first save had nothing in common with step {adopted.ref.step} of the base and sent everything. "
        "Are these the weights, in the same dtype, that the script has loaded?"
    )
    record.emit("warning", message=message)
    record.say(message)


class _Shared(msgspec.Struct, frozen=True):
    """What the other ranks must know of the base that rank 0 has taken."""

    ref: CheckpointRef
    home: str
    keys: dict[str, list[str]]


def share_base(
    together: Together,
    take: Callable[[], Adopted | None],
    base: Base,
    known: KnownChunks,
    *,
    open_home: StoreOpener,
    warn: Callable[[str], None],
) -> Adopted | None:
    """Every rank lets its own part refer to the base that rank 0 takes. A rank that cannot read it sends its part whole.

    Returns what `take` has, on rank 0. Raises what `take` raises there, RanksApart on the others.
    """
    mine: list[Adopted | None] = []

    def combine(_: list[bytes]) -> bytes:
        mine.append(take())
        if mine[0] is None:
            return b""
        keys = {home: sorted(names) for home, names in mine[0].keys.items()}
        return msgspec.json.encode(_Shared(mine[0].ref, mine[0].home, keys))

    answer = together.exchange("base", b"", combine, what=f"taking the base {base.url}")
    if mine or not answer:
        return mine[0] if mine else None
    shared = msgspec.json.decode(answer, type=_Shared)
    try:
        parts = open_checkpoint(open_home(base.url), shared.ref, open_home).parts
    except HoldfastError as error:
        warn(f"rank {together.rank} cannot read the base and sends its part of the first save whole: {error}")
        return None
    known.add_base(parts, shared.home, {home: frozenset(names) for home, names in shared.keys.items()})
    return None
