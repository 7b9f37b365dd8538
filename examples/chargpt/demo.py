"""`make demo`: a small GPT is trained twice at the same time, one of them is killed three times, and both come out the same.

    train.py, alone ─────────────────────────┐
    holdfast run -- train.py, killed 3 times ┴→ what they print → progress → ledger, hashes → tables, chart, exit code

Exit code 0: the run that was killed equals the reference bit by bit. 1: it does not, or a training failed. Everything is written
to `demo-out/`, which is cleared first.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from types import FrameType

from chart import Kill, draw_png, draw_terminal
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from training import Line, Point, Training

from holdfast.core.config import format_bytes, format_duration
from holdfast.core.contract import EXIT_INTERRUPTED
from holdfast.ledger.read import Summary, read_events, read_metrics, summarise
from holdfast.store.open import open_store

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "demo-out"
KILLS = 3
_EARLIEST, _LATEST = 0.08, 0.90
"""Kills fall into this part of the run: after something has been learnt, and before the end."""
_BAR_COLUMNS = 30
_ABOUT_ATTEMPTS = re.compile(r"attempt \d+ (starts|resumes|ended).*")


@dataclass(frozen=True, slots=True)
class Size:
    """What is trained. `full` takes about a minute and a half on two cores, `quick` a few seconds beside the start of Python."""

    epochs: int
    batches: int
    more: tuple[str, ...]

    @property
    def steps(self) -> int:
        return self.epochs * self.batches


FULL = Size(4, 100, ("--save-every", "20 steps"))
QUICK = Size(3, 40, ("--save-every", "6 steps", "--width", "64", "--layers", "3", "--context", "64", "--workers", "1"))


@dataclass
class Demo:
    """What is known while it runs."""

    console: Console
    folder: Path
    size: Size
    moments: list[float]
    """When to kill: so many steps, and the fraction of one more."""
    kills_sent: list[float] = field(default_factory=list)
    lines: queue.Queue[Line] = field(default_factory=queue.Queue)

    def run(self) -> bool:
        """Train both, print what came out; True when they are the same."""
        started_s = time.monotonic()
        with ExitStack() as stack:
            reference = self._start(stack, "reference", [])
            agent = [sys.executable, "-m", "holdfast", "run", "--report", str(self.folder / "killed.report.jsonl")]
            # A kill before the first save of an attempt is part of the experiment and not a reason to give up.
            killed = self._start(stack, "killed", [*agent, "--no-progress-limit", "0", "--grace", "20 s", "--"])
            if not self._follow(reference, killed):
                return False
        return self._conclude(reference, killed, time.monotonic() - started_s)

    def _start(self, stack: ExitStack, name: str, around: Sequence[str]) -> Training:
        command = [sys.executable, str(HERE / "train.py"), "--url", name, "--proof", f"{name}.json"]
        sizes = ["--epochs", str(self.size.epochs), "--batches", str(self.size.batches), *self.size.more]
        training = Training(name, [*around, *command, *sizes], self.folder, self.lines)
        stack.callback(training.stop)
        return training

    def _follow(self, reference: Training, killed: Training) -> bool:
        """Until both are done. False when one failed."""
        columns = [TextColumn("{task.description:<9}"), MarkedBar(), TextColumn("{task.fields[figures]}")]
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            tasks = {
                training.name: progress.add_task(training.name, total=self.size.steps, figures="starts", kills=marks)
                for training, marks in ((reference, []), (killed, self.kills_sent))
            }
            while not (reference.done and killed.done):
                training, text = self.lines.get()
                if text is None:
                    exit_code = training.wait()
                    if exit_code:
                        return self._failed(training, exit_code)
                    continue
                point = training.take(text)
                if point is None:
                    self._pass_on(training, text, killed)
                    continue
                progress.update(tasks[training.name], completed=point.step, figures=_figures(training, point))
                if training is killed:
                    self._kill_when_due(killed, progress.console.print)
        return True

    def _pass_on(self, training: Training, text: str, killed: Training) -> None:
        """What holdfast says about attempts of the run that is killed is part of the show; everything is in the log."""
        said = _ABOUT_ATTEMPTS.search(text)
        if training is killed and said is not None:
            self.console.print(Text("  " + "; ".join(said[0].split("; ")[:2]), style="dim"))

    def _kill_when_due(self, killed: Training, say: Callable[[Text], None]) -> None:
        if len(self.kills_sent) == len(self.moments):
            return
        moment = self.moments[len(self.kills_sent)]
        if killed.step < int(moment):
            return
        time.sleep(moment % 1 * killed.step_s)
        pid = killed.kill()
        if pid is not None:
            self.kills_sent.append(killed.step)
            say(Text(f"✗ SIGKILL to process {pid}, in step {killed.step + 1}", style="bold red"))

    def _failed(self, training: Training, exit_code: int) -> bool:
        tail = "\n".join(training.log_path.read_text().splitlines()[-15:])
        self.console.print(Text(f"\nThe training {training.name!r} failed with exit code {exit_code}:\n{tail}", "red"))
        return False

    def _conclude(self, reference: Training, killed: Training, took_s: float) -> bool:
        events = list(read_events(open_store(killed.url)))
        summary = summarise(events)
        kills = [
            Kill(before.reached_step, after.restored_step)
            for before, after in zip(summary.attempts, summary.attempts[1:], strict=False)
        ]
        how_often = _times(len(kills))
        picture = self.folder / "loss.png"
        title = f"A character-level GPT, killed {how_often}: the same training, step by step"
        draw_png(picture, reference.points, killed.points, kills, title)
        self.console.print(Text("\nTraining loss of the run that was killed  ", "bold") + _LEGEND)
        for row in draw_terminal(killed.points, kills, min(self.console.width, 100)):
            self.console.print(row)
        self.console.print(_attempts_table(summary, _endings(killed)))
        same = prove(self.folder, f"killed {how_often}", self.console)
        verdict = f"Killed {how_often}, and the same to the last bit" if same else "The two runs DIFFER"
        self.console.print(
            Text(f"\n{verdict} ", "bold green" if same else "bold red") + Text(f"({format_duration(took_s)})")
        )
        self.console.print(Text(f"Picture, hashes and logs: {self.folder}", style="dim"), soft_wrap=True)
        if len(kills) < len(self.moments):
            self.console.print(f"(Only {len(kills)} of {len(self.moments)} kills met a running process.)")
        return same


_PROVEN = {
    "weights": "weights",
    "optimizer": "optimizer state",
    "order": "order of the samples",
    "losses": "loss of every step",
}
_LEGEND = Text("┊✗ kill", "#c62828") + Text("  ") + Text("⠶ computed again", "#f6a623")


def prove(folder: Path, killed: str, console: Console) -> bool:
    """The hashes that the two processes wrote at their end, and the losses that the two ledgers hold."""
    ours, theirs = (
        json.loads((folder / f"{name}.json").read_text()) | {"losses": _losses(str(folder / name))}
        for name in ("reference", "killed")
    )
    table = Table(title="Proof: SHA-256 of what came out", title_justify="left", title_style="bold", box=SIMPLE)
    for column in ("", "reference", killed, ""):
        table.add_column(column)
    for key, name in _PROVEN.items():
        mark = Text("✓ equal", "green") if ours[key] == theirs[key] else Text("✗ DIFFERENT", "bold red")
        table.add_row(name, ours[key][:16] + "…", theirs[key][:16] + "…", mark)
    console.print(table)
    return all(ours[key] == theirs[key] for key in _PROVEN)


class MarkedBar(ProgressColumn):
    """A bar with a cross where a kill came."""

    def render(self, task: Task) -> Text:
        def cell(step: float) -> int:
            return min(_BAR_COLUMNS - 1, int(step / (task.total or 1) * _BAR_COLUMNS))

        done = cell(task.completed) + (task.completed > 0)
        kills = {cell(step) for step in task.fields["kills"]}
        bar = Text()
        for x in range(_BAR_COLUMNS):
            if x in kills:
                bar.append("✗", "bold red")
            else:
                bar.append("━", "green" if task.finished else "cyan" if x < done else "grey30")
        return bar


def _figures(training: Training, point: Point) -> str:
    attempt = f"  attempt {point.start}" if point.start > 1 else ""
    return f"{point.step:>3}  loss {point.loss:.2f}{attempt}"


def _losses(url: str) -> str:
    """A hash over the loss of every step, as the newest attempt that computed it logged it."""
    by_step = {step: loss for step, loss, _ in read_metrics(read_events(open_store(url)), "loss")}
    return sha256(json.dumps(sorted(by_step.items())).encode()).hexdigest()


def _endings(killed: Training) -> dict[int, str]:
    """How each attempt ended, by its number in the run, as the agent saw it."""
    endings = {}
    for ended in killed.reported("attempt.ended"):
        code = int(ended["exit_code"])
        how = signal.Signals(-code).name if code < 0 else "finished" if code == 0 else f"exit code {code}"
        if ended["progress"]:
            endings[int(ended["progress"]["attempt"])] = how
    return endings


def _attempts_table(summary: Summary, endings: dict[int, str]) -> Table:
    attempts = summary.attempts
    table = Table(
        title="What the kills cost",
        title_justify="left",
        title_style="bold",
        show_footer=True,
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    footers = {
        "attempt": "all",
        "steps": "",
        "ended by": "",
        "lost\nsteps": str(summary.lost_steps),
        "saves": str(sum(attempt.saves for attempt in attempts)),
        "stall\nper save": _median_ms([stall_s for attempt in attempts for stall_s in attempt.stall_s]),
        "sent": format_bytes(sum(attempt.sent_bytes for attempt in attempts)),
        "dedupli-\ncated": format_bytes(sum(attempt.deduplicated_bytes for attempt in attempts)),
    }
    for name, footer in footers.items():
        table.add_column(name, footer, justify="left" if name == "ended by" else "right", no_wrap=True)
    for attempt in attempts:
        table.add_row(
            str(attempt.number),
            f"{attempt.restored_step} → {attempt.reached_step}",
            endings.get(attempt.number, "?"),
            str(attempt.lost_steps),
            str(attempt.saves),
            _median_ms(attempt.stall_s),
            format_bytes(attempt.sent_bytes),
            format_bytes(attempt.deduplicated_bytes),
        )
    return table


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _median_ms(values_s: Sequence[float]) -> str:
    return f"{median(values_s) * 1000:.1f} ms" if values_s else "-"


def draw_moments(rng: random.Random, steps: int) -> list[float]:
    """One moment in each third, anywhere in it: between two steps, in the middle of one, or while a save is under way."""
    third = (_LATEST - _EARLIEST) / KILLS
    return [steps * (_EARLIEST + third * (number + rng.random())) for number in range(KILLS)]


def clear(folder: Path) -> None:
    """Remove what an earlier demo left there, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("reference", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
        for ending in ("json", "log", "report.jsonl"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    (folder / "loss.png").unlink(missing_ok=True)


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, kill three times, prove that the result is the same.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for everything that is written")
    parser.add_argument("--seed", type=int, help="draws the moments of the kills (default: the clock)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    seed = int(time.time()) if args.seed is None else args.seed
    size = QUICK if args.quick else FULL
    clear(args.out)
    console = Console(highlight=False)
    console.print(
        f"Two trainings of {size.steps} steps on the source of Python's standard library. One is killed {KILLS} times, "
        f"at moments drawn with --seed {seed}.\n"
    )
    try:
        demo = Demo(console, args.out.resolve(), size, draw_moments(random.Random(seed), size.steps))
        return 0 if demo.run() else 1
    except KeyboardInterrupt:
        console.print("\nInterrupted: both trainings have been stopped.")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
