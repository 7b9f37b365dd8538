"""`Run(url, base=…)`: which other run is meant, and what its base may cost or save this one.

A base only spares sending: the script loads its weights as it likes. So a base that cannot be used stops a run that has nothing yet
(a typo must not silently send terabytes), and is a warning for one that goes on from its own checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.retain import StoreOpener
from holdfast.checkpoint.runs.base import adopt_base, relies_on
from holdfast.checkpoint.runs.inspect import current_checkpoints
from holdfast.checkpoint.runs.pins import are_out_of_reach
from holdfast.checkpoint.saver import Saver
from holdfast.core.errors import Fenced, HoldfastError, UsageError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.store.open import normalise_url
from holdfast.train.record import Record

__all__ = ["Base", "choose_base", "take_base"]

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
) -> Callable[[], None]:
    """Let the first save refer to the base; call the result once that save is committed. Before anything else uses the lineage.

    Does nothing when the run's newest checkpoint refers to the base already. Raises what `adopt_base` says, for a run that has no
    checkpoint of its own yet.
    """
    where = open_home(base.url)
    if relies_on(lineage.head, saver.roots, where.url):
        return lambda: None
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
        return lambda: None
    saver.known.add_base(adopted.parts, adopted.home, adopted.keys)
    record.say(f"{base.url}: what is the same as in step {adopted.ref.step} of this base is referred to and not sent")
    record.emit("base.adopted", base=where.url, checkpoint=adopted.ref.name, step=adopted.ref.step)

    def first_save() -> None:
        if not adopted.keys.keys() & {pin.home for pin in lineage.head.pins}:
            message = (
                f"{base.url}: the first save had nothing in common with step {adopted.ref.step} of the base and sent everything. "
                "Are these the weights, in the same dtype, that the script has loaded?"
            )
            record.emit("warning", message=message)
            record.say(message)

    return first_save
