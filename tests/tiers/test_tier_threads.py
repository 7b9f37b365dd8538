"""Staging and promoting beside each other: nothing queues, memory stays under its cap, no order of events loses a save."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interleaved import RUN_ID, FakeClock, InlineExecutor, load_tree, no_home
from parts import garbage, request
from two_tiers_parts import (
    Attempt,
    Gate,
    Outage,
    begin,
    disk_files,
    newest_in_store,
    state,
)

from holdfast.checkpoint import pack, promote, write
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.outcomes import SaveTask
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import Saver, SaverOptions
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tier import LocalTier, Tier, load_staged
from holdfast.checkpoint.tree import flatten
from holdfast.core.errors import Fenced
from holdfast.core.events import CollectingSink
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import FaultyStore

pytestmark = pytest.mark.usefixtures("small_chunks", "no_flush")


def test_staging_does_not_queue_behind_a_slow_store(tmp_path: Path) -> None:
    """Many objects are on their way and the store stands still; with one sending thread."""
    gate, local = Gate(MemoryStore()), LocalTier(tmp_path)
    attempt = begin(gate, local)
    gate.open.clear()
    large = {"large": np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8), "who": "A1"}
    attempt.saver.save(request(large, 1))
    attempt.told.wait_for("save.staged", 1)
    assert len([key for key in disk_files(local) if key.startswith("data/")]) > 10
    for number in (2, 4):
        attempt.stage(number)
    gate.open.set()
    assert attempt.saver.drain(60)
    assert newest_in_store(gate) == 4
    attempt.close()


def test_memory_of_a_promotion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objects at once, however many there are."""
    object_bytes = 1 << 20
    monkeypatch.setattr(write, "CHUNK_BYTES", object_bytes)
    monkeypatch.setattr(pack, "OBJECT_BYTES", object_bytes)
    flat = flatten({"x": np.random.default_rng(0).integers(0, 256, 24 * object_bytes, dtype=np.uint8)})
    tier = Tier(LocalTier(tmp_path), RUN_ID)
    written = write.write_checkpoint(
        stream(flat, lay_out(flat), step=1, epoch=0, metadata={}), tier.store, run_id=RUN_ID, attempt=1, sequence=2,
        known=write.KnownChunks(), tokens=random_token, hashing=InlineExecutor(), sending=InlineExecutor(),
        uploaded=set(),
    )  # fmt: skip
    assert len(written.sent_objects) == 24
    head = Lineage(MemoryStore(), RUN_ID, clock=FakeClock(), tokens=random_token).claim()
    ref = CheckpointRef(
        name=written.root.name, root_blake3=written.root_blake3, step=1, epoch=0, generation=1, attempt=1, unix_s=0.0,
        total_bytes=written.total_bytes,
    )  # fmt: skip
    staged = tier.record(written, ref, head, [""])

    class Forgetful(MemoryStore):
        def put(self, key: str, body: Any) -> None:
            return None

    tracemalloc.start()
    try:
        promote.send(staged, tier.store, Forgetful(), uploaded=set())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert promote.PROMOTION_BYTES == 2 * (64 << 20)
    assert 2 * object_bytes <= peak_bytes <= 2.5 * object_bytes
    tier.close()


def test_promotions_are_part_of_the_staging_cap(tmp_path: Path) -> None:
    """A cap of three states is two snapshots and what a promotion holds; without a disk, two as well; below two, none is staged in
    memory and the disk takes them from the live arrays."""
    for snapshots, cap, disk in ((2, 3.0, True), (1, 2.0, True), (0, 1.0, True), (1, 1.0, False)):
        store, sink = MemoryStore(), CollectingSink()
        lineage = Lineage(store, RUN_ID, clock=FakeClock(), tokens=random_token)
        lineage.claim()
        tier = Tier(LocalTier(tmp_path), RUN_ID)
        assert tier.hold()
        state_bytes = 1 << 20
        saver = Saver(
            store, lineage, options=SaverOptions(keep=Keep(1), staging_cap_bytes=int(cap * state_bytes)),
            open_home=no_home, clock=FakeClock(), tokens=random_token, sink=sink, tier=tier if disk else None,
        )  # fmt: skip
        tree = {"x": np.zeros(state_bytes, np.uint8), "who": "A1"}
        saver.save(request(tree, 1)).wait(60)
        saver.close(60)
        tier.close()
        (planned,) = sink.named("staging.planned")
        assert planned.fields["slots"] == snapshots
        assert len(sink.named("save.staged")) == disk
        (done,) = sink.named("save.committed")
        assert done.fields["stall_s"] is not None


def test_two_threads_under_stress(tmp_path: Path) -> None:
    """Saver and promoter at full speed, with retention that drops what the other refers to; every so often the disk is looked at as
    the next attempt would, and must hold the newest that was reported, whole."""
    rounds = 400 if os.environ.get("HOLDFAST_TEST_SCALE") == "long" else 60
    store, local = MemoryStore(), LocalTier(tmp_path)
    attempt = begin(store, local, keep=1)
    done, wrong = threading.Event(), []
    looked = 0

    def look() -> None:
        nonlocal looked
        while not done.is_set():
            try:
                looked += _look(attempt, store, local)
            except BaseException as error:
                wrong.append(error)
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(rounds):
        attempt.saver.save(request(state(number), number))
        if number % 3 == 0:
            attempt.saver._drain_snapshots(60)
    assert attempt.saver.drain(60)
    done.set()
    watcher.join(60)
    assert wrong == []
    assert looked > 0
    assert attempt.told.steps("save.failed") == []
    assert attempt.warnings() == []
    attempt.close()
    assert newest_in_store(store) == rounds - 1
    assert garbage(store) == set()


def _look(attempt: Attempt, store: Store, local: LocalTier) -> bool:
    """False when so much happened meanwhile that nothing can be said."""
    seen = len(attempt.told.events)
    reported = max([*attempt.told.steps("save.staged"), *attempt.told.steps("save.committed"), -1])
    head = read_truth(store, RUN_ID).head
    assert head is not None
    tier, passed_over = Tier(local, RUN_ID), []

    def fell_back(fallback: Any) -> None:
        passed_over.append(fallback)

    found = load_staged(tier, store, head, no_home, load_tree, fell_back=fell_back)
    tier.close()
    if len(attempt.told.events) != seen:
        return False
    committed = head.checkpoints[-1].step if head.checkpoints else -1
    assert max(committed, -1 if found is None else found[0].ref.step) >= reported
    assert passed_over == []
    return True


def test_a_disk_that_counts_does_not_hide_that_another_attempt_owns_the_run(tmp_path: Path) -> None:
    """Whichever of the two is reported last."""
    attempt = begin(MemoryStore(), LocalTier(tmp_path, outlives=True))
    outcomes = attempt.saver._outcomes
    handle = attempt.stage(1)
    task = SaveTask(handle=handle, step=1, reason="test", finish=False, taken_s=0.0, stall_s=0.0)
    outcomes.failed(task, Fenced("another attempt owns this run now"))
    attempt.stage(2).wait(60)
    with pytest.raises(Fenced):
        attempt.warnings()
    attempt.close()


def test_what_a_direct_save_has_overtaken_goes(tmp_path: Path) -> None:
    """No room any more: saves go directly, and what was staged before is history and goes at the end."""
    outage, local = Outage(), LocalTier(tmp_path, cap="1 MB")
    store = MemoryStore()
    attempt = begin(FaultyStore(store, outage), local)
    attempt.save(1)
    outage.on = True
    attempt.stage(2)
    assert attempt.saver.drain(60)
    outage.on = False
    assert attempt.tier is not None
    attempt.tier._cap_bytes = 1
    attempt.save(4)
    assert attempt.told.steps("save.staged") == [1, 2]
    assert newest_in_store(store) == 4
    attempt.close()
    assert not (tmp_path / RUN_ID).exists()
    assert garbage(store) == set()
