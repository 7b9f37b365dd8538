"""What a run's ledger says about its steps: which attempt computed which of them, and with what figures.

The surviving lineage is read backwards: the last attempt began with a checkpoint, which another attempt committed, which began with
a checkpoint … Between these every step must be counted exactly once. Of a figure that was logged twice, by an attempt that was lost
and by the one that computed it again, the newest counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.contract import EXIT_DONE, EXIT_FENCED
from holdfast.ledger.read import Recorded, read_events
from holdfast.store.local import LocalStore

__all__ = ["FigureChange", "Start", "Story", "differing_figures", "ends_at", "miscounted", "story_of"]

_CODES = {"attempt.finished": EXIT_DONE, "attempt.fenced": EXIT_FENCED}


@dataclass(frozen=True, slots=True)
class Start:
    """Where an attempt went on from: the step, and the checkpoint (None: from nothing)."""

    attempt: int
    step: int
    restored: str | None


@dataclass(frozen=True, slots=True)
class Story:
    """One run, as it recorded itself. Figures by (step, name), each with the attempt that logged it last."""

    starts: tuple[Start, ...]
    commits: Mapping[str, tuple[int, int]]
    """By checkpoint: who committed it, and its step."""
    figures: Mapping[tuple[int, str], tuple[float, int]]
    ends: Mapping[int, int]
    """By attempt: the exit code that it recorded before it left. One that had no time to has none."""
    fell_back: int
    evaluation_s: float
    notice_to_durable_s: float | None
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FigureChange:
    """The first figure that is not the same."""

    step: int
    name: str
    before: float
    now: float
    attempt: int
    resumed_at: int
    """Where that attempt had gone on from; 0 for one that began from nothing."""
    count: int
    """How many figures differ in all."""


def story_of(events: Iterable[Recorded]) -> Story:
    starts: dict[int, Start] = {}
    commits: dict[str, tuple[int, int]] = {}
    figures: dict[tuple[int, str], tuple[float, int]] = {}
    ends: dict[int, int] = {}
    durable_s: list[float] = []
    errors: list[str] = []
    fell_back, evaluation_s = 0, 0.0
    for recorded in events:
        attempt, name, fields = recorded.attempt, recorded.event.name, recorded.event.fields
        evaluation_s = max(evaluation_s, float(fields.get("evaluation_s") or 0.0))
        if name == "attempt.started" and recorded.node == "0":
            starts[attempt] = Start(attempt, int(fields["step"]), fields["restored"])
        elif name == "save.committed":
            commits[fields["checkpoint"]] = attempt, int(fields["step"])
        elif name == "metrics":
            step = int(fields["step"])
            figures |= {(step, figure): (float(value), attempt) for figure, value in fields["values"].items()}
        elif name == "restore.fell_back":
            fell_back += 1
        elif name == "attempt.leaving":
            ends[attempt] = int(fields["code"])
            if fields.get("notice_to_durable_s") is not None:
                durable_s.append(float(fields["notice_to_durable_s"]))
        elif name in _CODES:
            ends[attempt] = _CODES[name]
        elif name == "attempt.failed":
            errors.append(f"attempt {attempt}: {fields.get('error')}")
    return Story(
        tuple(starts[number] for number in sorted(starts)), commits, figures, ends, fell_back, evaluation_s,
        max(durable_s, default=None), tuple(errors),
    )  # fmt: skip


def ends_at(run: Path) -> Mapping[int, int]:
    """The same as `Story.ends`, of a run that may go on. Empty where its folder is not there."""
    return story_of(read_events(LocalStore(run))).ends if run.is_dir() else {}


def miscounted(story: Story) -> list[str]:
    """Steps of the surviving lineage that are not counted exactly once, in words. A commit by an agent that stepped in for a dead
    trainer is recorded elsewhere: its step is taken from the start that follows it."""
    found = []
    for start in story.starts:
        if start.restored is None:
            if start.step:
                found.append(
                    f"attempt {start.attempt} began at step {start.step} without a checkpoint: steps are skipped"
                )
            continue
        committed = story.commits.get(start.restored)
        if committed is None:
            continue
        attempt, step = committed
        if step != start.step:
            what = "skipped" if start.step > step else "repeated"
            found.append(
                f"attempt {start.attempt} went on at step {start.step} with the checkpoint of step {step} (of attempt {attempt}): "
                f"{abs(step - start.step)} steps are {what}"
            )
    return found


def differing_figures(before: Story, now: Story, tolerance: float = 0.0) -> FigureChange | None:
    """The first figure, by step, that both have logged and that differs by more than `tolerance` of its size."""
    common = sorted(before.figures.keys() & now.figures.keys())
    changed = [key for key in common if not _same(before.figures[key][0], now.figures[key][0], tolerance)]
    if not changed:
        return None
    (step, name), (value, attempt) = changed[0], now.figures[changed[0]]
    resumed_at = next((start.step for start in now.starts if start.attempt == attempt), 0)
    return FigureChange(step, name, before.figures[changed[0]][0], value, attempt, resumed_at, len(changed))


def _same(a: float, b: float, tolerance: float) -> bool:
    return a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b))
