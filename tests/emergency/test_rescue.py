"""The trainer is killed while snapshots lie in memory: the agent commits the newest complete one, and no other."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forking import Zygote
from grounds import Ground, eventually

from holdfast.agent.heir import rescue
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.handover import left_behind
from holdfast.checkpoint.staging import Slot
from holdfast.core.clock import SystemClock
from holdfast.core.events import Event
from holdfast.store.base import Store
from holdfast.store.local import LocalStore

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 100 if LONG else 5


class Told:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def open_plain(url: str, *, options: Mapping[str, str] | None = None) -> Store:
    return LocalStore(url.removeprefix("file://"))


def rescued(ground: Ground) -> CheckpointRef | None:
    assert ground.agent is not None
    return rescue(
        ground.control,
        ground.agent.slots(),
        open_store=open_plain,
        clock=SystemClock(),
        sink=Told(),
        say=lambda line: None,
    )


def resident_bytes_of_staging() -> dict[str, int]:
    """Per inode of staging memory that is mapped here."""
    found: dict[str, int] = {}
    inode = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if "-" in first and not first.endswith(":"):
            inode = others[3] if "holdfast-staging" in line else ""
        elif inode and first == "Rss:":
            found[inode] = found.get(inode, 0) + (int(others[0]) << 10)
    return found


def test_killed_at_random_moments(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """A blocked store, a snapshot every step: what is committed is the newest one described, whole, and newer than before. Nothing
    leaks, and the agent has no page of the memory before it reads it."""
    rng = random.Random(5)
    of_other_tests = resident_bytes_of_staging().keys()
    ground = Ground(zygote, tmp_path / "a", save_every="1 step")
    with ground.attended():
        descriptors: set[str] = set()
        for number in range(KILLS):
            before = ground.durable_step()
            (ground.control / "block").unlink(missing_ok=True)
            ground.start(pace_s=0.002)
            goal = before + 1 + rng.randrange(3)
            ground.until(lambda goal=goal: ground.step() >= goal)
            (ground.control / "block").touch()
            goal = min(ground.step() + 1 + rng.randrange(4), 118)
            ground.until(lambda goal=goal: ground.step() >= goal)
            ground.kill()
            ours = {key: size for key, size in resident_bytes_of_staging().items() if key not in of_other_tests}
            assert sum(ours.values()) == 0, ours
            committed, left = ground.durable_step(), left_behind(ground.control)
            ref = rescued(ground)
            reached = max(committed, *(one.share.step for one in left), 0)
            assert ground.durable_step() == reached, ground.log.read_text()
            assert (ref is not None) == (reached > committed)
            assert rescued(ground) is None
            assert ground.agent is not None
            ground.agent.forget_slots()
            if number == 2:
                descriptors = set(os.listdir("/proc/self/fd"))
            if ground.durable_step() > 100:
                break
        assert not descriptors or len(set(os.listdir("/proc/self/fd"))) <= len(descriptors)
    assert resident_bytes_of_staging().keys() <= of_other_tests
    assert {path.name.split("-")[0] for path in ground.control.iterdir()} <= {"progress", "stacks", "block", "snapshot"}
    ground.assert_exact(reference)


def test_the_one_that_waits_behind_a_blocked_save(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """Two snapshots in memory, one being written, one waiting: the newer one is rescued."""
    ground = Ground(zygote, tmp_path / "a", save_at=(3, 5), wait_for_save=False, place="stepping:7")
    (ground.control / "block").touch()
    with ground.attended():
        ground.start()
        ground.until_place()
        eventually(lambda: 5 in [left.share.step for left in left_behind(ground.control)])
        ground.kill()
        ref = rescued(ground)
    assert ref is not None
    assert ref.step == 5
    ground.assert_exact(reference)


def test_killed_inside_the_copy(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """The slot that was being filled is not described any more; the other one is what is committed."""
    ground = Ground(zygote, tmp_path / "a", save_at=(3, 5, 7), wait_for_save=False, place="copying:7")
    (ground.control / "block").touch()
    with ground.attended():
        ground.start()
        ground.until_place()
        ground.kill()
        ref = rescued(ground)
    assert ref is not None
    assert ref.step == 3
    ground.assert_exact(reference)


def test_not_when_somebody_else_has_claimed(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path / "a", save_at=(3,), wait_for_save=False, place="stepping:5")
    (ground.control / "block").touch()
    with ground.attended():
        ground.start()
        ground.until_place()
        ground.kill()
        assert ground.agent is not None
        slots = {key: Slot(slot.size_bytes, os.dup(slot.descriptor)) for key, slot in ground.agent.slots().items()}
        ground.agent.forget_slots()
        kept = {path: path.read_bytes() for path in ground.control.glob("snapshot-*")}
        assert kept
        assert ground.finish() == reference  # another attempt has claimed, and is done
        for path, body in kept.items():
            path.write_bytes(body)
        done = ground.checkpoints()
        told = Told()
        assert rescue(ground.control, slots, open_store=open_plain, clock=SystemClock(), sink=told, say=print) is None
        assert ground.checkpoints() == done
        # Descriptions that are nonsense are no reason for an agent to fall.
        next(iter(kept)).write_bytes(b"\x93nonsense")
        assert rescue(ground.control, slots, open_store=open_plain, clock=SystemClock(), sink=told, say=print) is None
        for slot in slots.values():
            slot.close()
