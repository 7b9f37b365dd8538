"""When the trainer has died: the newest snapshot that it left in shared memory is committed by the agent.

control folder (descriptions) + slots (memory) → checkpoint/handover.py → a committed checkpoint, or a reason why not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast.checkpoint.estate import commit_left_behind
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.handover import inherited
from holdfast.checkpoint.staging import Slot
from holdfast.core.clock import Clock
from holdfast.core.events import Event, Sink
from holdfast.core.ids import random_token
from holdfast.store.base import Store

__all__ = ["rescue"]


def rescue(
    folder: Path,
    slots: Mapping[int, Slot],
    *,
    open_store: Callable[[str], Store],
    clock: Clock,
    sink: Sink,
    say: Callable[[str], None],
) -> CheckpointRef | None:
    """Commit what dead trainers of this machine left behind, if it is a whole state and newer than what is committed. Never raises:
    the next attempt starts anyway.

    `slots`: by `memory_id`. `sink` gets `snapshot.rescued` or `snapshot.lost`.
    """
    found = inherited(folder, slots)
    if not found:
        return None
    stores: dict[str, Store] = {}

    def open_home(url: str) -> Store:
        if url not in stores:
            stores[url] = open_store(url)
        return stores[url]

    started_s = clock.monotonic_s()
    try:
        ref = commit_left_behind(
            found, open_home(found[0].left.url), open_home=open_home, clock=clock, tokens=random_token
        )
    except Exception as error:  # The description comes from a process that has died: whatever is wrong with it.
        step = max(one.left.share.step for one in found)
        say(f"holdfast: the snapshot of step {step}, which the command left in memory, could not be committed: {error}")
        sink.emit(Event("snapshot.lost", clock.unix_s(), {"step": step, "error": str(error)}))
        return None
    finally:
        for store in stores.values():
            store.close()
    if ref is not None:
        took_s = clock.monotonic_s() - started_s
        say(f"holdfast: committed the snapshot of step {ref.step} that the command left in memory")
        sink.emit(
            Event("snapshot.rescued", clock.unix_s(), {"step": ref.step, "checkpoint": ref.name, "durable_s": took_s})
        )
    return ref
