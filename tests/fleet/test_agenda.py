"""What a fleet's controller has to do next: nothing is lost, nothing is in two hands, the urgent comes first, failures wait."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import pytest

from holdfast.fleet.agenda import Agenda, Turn, Urgency
from holdfast.fleet.shell import Look
from holdfast.testing.clock import ManualClock

RUNS = ("a", "b", "c")


def drawn(rng: random.Random) -> list[tuple[Any, ...]]:
    def act() -> tuple[Any, ...]:
        run, look, urgency = rng.choice(RUNS), rng.choice(list(Look)), rng.choice(list(Urgency))
        acts: list[tuple[Any, ...]] = [
            ("call", run, look, urgency), ("at", run, rng.randint(0, 20), look, urgency), ("take",), ("take",),
            ("done", rng.randint(0, 2)), ("failed", rng.randint(0, 2), look, rng.randint(1, 8)), ("pass", rng.randint(1, 6)),
        ]  # fmt: skip
        return rng.choice([*acts, *acts, ("away", run), ("back", run)])

    return [act() for _ in range(100)]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_and_nothing_in_two_hands(seed: int) -> None:
    for number in range(100):
        play(drawn(random.Random(1000 * seed + number)))


def play(script: list[tuple[Any, ...]]) -> None:
    """Against a plain model: what is owed to each run, and when it may come at the soonest."""
    clock = ManualClock()
    agenda = Agenda(clock.monotonic_s)
    owed: dict[str, Look] = {}
    not_before: dict[str, float] = {}
    at: dict[tuple[str, Look], float] = {}
    present: set[str] = set(RUNS)
    in_hand: list[Turn] = []
    stale: list[Turn] = []
    for run in RUNS:
        agenda.add(run)

    def owe(run: str, look: Look) -> None:
        owed[run] = max(owed.get(run, Look.AWAY), look)

    def ring() -> None:
        for (run, look), at_s in list(at.items()):
            if at_s <= clock.monotonic_s():
                del at[run, look]
                owe(run, look)

    for act in script:
        ring()
        now_s = clock.monotonic_s()
        match act:
            case ("call", run, look, urgency):
                agenda.call(run, look, urgency)
                if run in present:
                    owe(run, look)
            case ("at", run, in_s, look, urgency):
                agenda.call_at(run, now_s + in_s, look, urgency)
                if run in present:
                    at[run, look] = now_s + in_s
            case ("take",):
                ring()
                held = {turn.run_id for turn in in_hand}
                free = {run for run in owed if run not in held and not_before.get(run, 0.0) <= now_s}
                turn = agenda.take()
                if turn is None:
                    assert not free
                    continue
                assert turn.run_id in free
                assert turn.look == owed.pop(turn.run_id)
                in_hand.append(turn)
            case ("done", which) if which < len(in_hand):
                turn = in_hand.pop(which)
                agenda.done(turn)
                not_before.pop(turn.run_id, None)
            case ("failed", which, look, retry_s) if which < len(in_hand):
                turn = in_hand.pop(which)
                agenda.failed(turn, look, retry_s)
                not_before[turn.run_id] = now_s + retry_s
                owe(turn.run_id, look)
            case ("pass", seconds):
                clock.advance(seconds)
            case ("away", run) if run in present:
                held_here = any(turn.run_id == run for turn in in_hand)
                assert agenda.remove(run) is held_here
                present.discard(run)
                stale += [turn for turn in in_hand if turn.run_id == run]
                in_hand = [turn for turn in in_hand if turn.run_id != run]
                owed.pop(run, None)
                not_before.pop(run, None)
                for key in [key for key in at if key[0] == run]:
                    del at[key]
            case ("back", run) if run not in present:
                agenda.add(run)
                present.add(run)
                for turn in stale:
                    # Whoever had it before gives it back now: that concerns nobody any more.
                    if turn.run_id == run:
                        agenda.done(turn)
                stale = [turn for turn in stale if turn.run_id != run]
    for turn in in_hand:
        agenda.done(turn)
    clock.advance(100)
    ring()
    last = set()
    while (found := agenda.take()) is not None:
        last.add(found.run_id)
    assert last == set(owed)


def test_the_urgent_comes_first() -> None:
    clock = ManualClock()
    agenda = Agenda(clock.monotonic_s)
    for run, urgency in (
        ("turn", Urgency.ROUND),
        ("list", Urgency.LISTED),
        ("due", Urgency.DUE),
        ("news", Urgency.NEWS),
    ):
        agenda.add(run)
        agenda.call(run, Look.AWAY, urgency)
    agenda.call("turn", Look.ALL, Urgency.NEWS)
    agenda.call("turn", Look.AWAY, Urgency.ROUND)
    taken = [agenda.take() for _ in range(5)]
    assert [None if each is None else (each.run_id, each.look) for each in taken] == [
        ("news", Look.AWAY), ("turn", Look.ALL), ("due", Look.AWAY), ("list", Look.AWAY), None,
    ]  # fmt: skip


def test_many_threads() -> None:
    """Eight threads take what four call for: each run is in one hand at a time, and after the last call every run is looked at."""
    agenda = Agenda(lambda: 0.0)
    runs = [f"r{i}" for i in range(20)]
    held: Counter[str] = Counter()
    looked: Counter[str] = Counter()
    twice: list[str] = []
    lock, over = threading.Lock(), threading.Event()
    for run in runs:
        agenda.add(run)

    def work() -> None:
        while True:
            turn = agenda.take(0.01)
            if turn is None:
                if over.is_set():
                    return
                continue
            with lock:
                held[turn.run_id] += 1
                if held[turn.run_id] > 1:
                    twice.append(turn.run_id)
            with lock:
                held[turn.run_id] -= 1
                looked[turn.run_id] += 1
            agenda.done(turn)

    def call(offset: int) -> None:
        for number in range(500):
            agenda.call(runs[(number * 7 + offset) % 20], Look.WORDS, Urgency.NEWS)

    workers = [threading.Thread(target=work) for _ in range(8)]
    callers = [threading.Thread(target=call, args=(offset,)) for offset in range(4)]
    for each in (*workers, *callers):
        each.start()
    for each in callers:
        each.join()
    before = Counter(looked)
    for run in runs:
        agenda.call(run, Look.ALL, Urgency.ROUND)
    over.set()
    for each in workers:
        each.join()
    assert not twice
    assert all(looked[run] > before[run] or looked[run] >= 1 for run in runs)
    assert agenda.take() is None
