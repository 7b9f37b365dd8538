"""The test's side of the adapters' victims: trainings that nobody disturbs, attempts that are stopped at a place, what is left."""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forking import Zygote
from jobs import Job
from killing import Ground

from holdfast.checkpoint.format import Head
from holdfast.checkpoint.heads import read_truth
from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.store.open import open_store

__all__ = [
    "References",
    "check_stream",
    "fetched_by_the_last",
    "ground_for",
    "head_of",
    "killed_often",
    "saved_steps",
    "stopped_at",
    "struck_often",
]


class References(dict[str, Any]):
    """What trainings come to that are never interrupted, by name; each is made when it is asked for."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = made = self._make(name)
        return made


def ground_for(zygote: Zygote, folder: Path, settings: dict[str, Any], **more: Any) -> Ground:
    return Ground(zygote, folder, str(folder / "run"), **{**settings, **more})


def stopped_at(ground: Ground, place: str, number: int, **changes: Any) -> int:
    """One attempt that gets this signal at that place. Its exit code."""
    attempt = ground.start(pause_in=place, **changes)
    attempt.wait_until(ground.place_reached)
    assert ground.place_reached(), ground.log.read_text()
    attempt.signal(number)
    if number != signal.SIGKILL and not place.startswith("evaluating"):
        ground.go_on()
    return attempt.wait()


def killed_often(
    zygote: Zygote, folder: Path, settings: dict[str, Any], times: int, seed: str
) -> Iterator[dict[str, Any]]:
    """So many kills, anywhere, of as many trainings as it takes, since each gets on between them; what each came to."""
    rng, kills = random.Random(seed), 0
    for number in itertools.count():
        ground = ground_for(zygote, folder / str(number), settings)
        while kills + ground.kills < times and ground.kill_at_random(rng):
            pass
        kills += ground.kills
        yield ground.finish()
        if kills == times:
            return


def struck_often(
    zygote: Zygote, folder: Path, settings: dict[str, Any], times: int, seed: str
) -> Iterator[list[dict[str, Any]]]:
    """The same of jobs on two ranks, of which one or both are killed at a time."""
    rng, strikes = random.Random(seed), 0
    for number in itertools.count():
        job = Job(zygote, folder / str(number), **settings)
        while strikes < times and job.strike_at_random(rng, signal.SIGKILL):
            strikes += 1
        yield job.finish()
        if strikes == times:
            return


def check_stream(zygote: Zygote, folder: Path, data: str, samples: int, batch: int, **settings: Any) -> None:
    """Noticed in its first epoch and in its second. Without a state, what was used is read and dropped, and a warning at
    the start says so; with one, nothing is."""
    per_epoch = samples // batch
    settings |= {"data": data, "max_steps": 2 * per_epoch + 5, "save_every": "1 h"}
    reference = ground_for(zygote, folder / "reference", settings).finish()
    assert reference["samples"] == [*range(samples), *range(samples), *range(5 * batch)]
    ground = ground_for(zygote, folder / "noticed", settings)
    for step in (6, per_epoch + 4):
        assert stopped_at(ground, f"stepping:{step}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    outcome = ground.finish()
    again = 4 * batch if data == "stream" else 0
    left = (samples - 4 * batch) + 5 * batch
    assert len(fetched_by_the_last(ground)) == again + left
    assert outcome["samples"] == reference["samples"]
    assert ("reads and drops all batches" in ground.log.read_text()) == (data == "stream")
    assert outcome == reference


def head_of(ground: Ground) -> Head:
    head = read_truth(open_store(ground.url)).head
    assert head is not None
    return head


def saved_steps(ground: Ground) -> list[int]:
    return [ref.step for ref in head_of(ground).checkpoints]


def fetched_by_the_last(ground: Ground) -> list[int]:
    fetched: list[int] = json.loads((ground.folder / "fetched").read_text())
    return fetched
