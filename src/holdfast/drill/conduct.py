"""The drill from its beginning to its end: two uninterrupted runs, the scenarios, the verdicts.

    command → reference, twice → same? yardstick, baseline, estimate → scenario by scenario: play → evidence → judge → DrillReport

Everything lies in one scratch folder: a store, a working folder and a log for each run. It is removed at the end, unless it is
to be kept; and no process outlives the drill.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.clock import Clock
from holdfast.core.contract import EXIT_DONE
from holdfast.core.errors import HoldfastError, RestoreError, UsageError
from holdfast.drill.attempt import Course, Crew, Stuck
from holdfast.drill.judge import Evidence, Yardstick, judge, why_not_deterministic
from holdfast.drill.report import DrillReport, Status, Verdict
from holdfast.drill.scenarios import SCENARIOS, Baseline, Record, Skipped
from holdfast.drill.state import GENERATORS, Difference, FinalState, compare, drawn_from, newest_state
from holdfast.drill.story import Story, differing_figures, story_of
from holdfast.ledger.read import read_events
from holdfast.policy.restart import describe_exit
from holdfast.store.local import LocalStore

__all__ = ["DrillOptions", "Stage", "conduct"]

_SPREADS = 4.0
"""Two runs show one sample of the spread: four times that much is taken for the same."""
_STUCK_LEAST_S = 120.0
_STUCK_RUNS = 10.0
_LONGEST_TMPDIR = 55


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillOptions:
    """What to play. `tolerance` is relative; None: bit by bit, or what two uninterrupted runs differ by. `here`: the command runs
    in the present folder, for scripts that read relative paths. `keep`: where the scratch folder goes afterwards."""

    scenarios: tuple[str, ...] = ()
    times: int = 3
    tolerance: float | None = None
    seed: int = 0
    here: bool = False
    keep: Path | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.scenarios if name not in SCENARIOS]
        if unknown:
            raise UsageError(f"there is no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
        if self.times < 1:
            raise UsageError(f"times ({self.times}) is at least 1")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance ({self.tolerance}) is a relative difference: 0 or more, and less than 1")
        if self.keep is not None and self.keep.exists():
            raise UsageError(f"--keep: {str(self.keep)!r} exists; name a folder that does not")


@dataclass(frozen=True, slots=True)
class Stage:
    """How far the drill is. `left_s` is an estimate, once there can be one."""

    doing: str
    done: int
    total: int
    left_s: float | None


def conduct(
    command: Sequence[str],
    options: DrillOptions,
    *,
    clock: Clock,
    environment: Mapping[str, str],
    told: Callable[[Stage], None] = lambda stage: None,
) -> DrillReport:
    """Play the drill. Raises UsageError when the command cannot be started at all; what else goes wrong is in the report."""
    if not command:
        raise UsageError("no command was given; write it after two dashes: holdfast drill -- python train.py")
    if options.keep is not None:
        # Now, and not after an hour of drilling.
        options.keep.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="holdfast-drill-"))
    temporary = _short_folder()
    crew = Crew()
    try:
        return _Drill(command, options, scratch, temporary, crew, clock, environment, told).run()
    finally:
        crew.end_all()
        shutil.rmtree(temporary, ignore_errors=True)
        if options.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            shutil.move(scratch, options.keep)


def _short_folder() -> Path:
    """For the trainings' temporary files: what is killed cannot clear them away. Loader workers pass tensors through sockets that
    they make there, and a socket's path has 107 characters at most, of which they need 32.
    """
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp" if len(usual) > _LONGEST_TMPDIR else usual))


@dataclass(frozen=True, slots=True)
class _Ended:
    """An uninterrupted run that went well."""

    state: FinalState
    story: Story
    baseline: Baseline
    startup_s: float


class _Unfit(Exception):
    """The uninterrupted run already shows why the script cannot be drilled."""


class _Drill:
    def __init__(
        self,
        command: Sequence[str],
        options: DrillOptions,
        scratch: Path,
        temporary: Path,
        crew: Crew,
        clock: Clock,
        environment: Mapping[str, str],
        told: Callable[[Stage], None],
    ) -> None:
        self._given, self._options, self._crew = tuple(command), options, crew
        self._scratch, self._temporary = scratch, temporary
        self._clock, self._told = clock, told
        self._here = Path.cwd()
        self._command = self._given if options.here else _absolute(command, self._here)
        self._environment = _clean(environment, self._here)
        self._names = list(options.scenarios) or list(SCENARIOS)
        self._limit_s: float | None = None
        self._begun_s = clock.monotonic_s()

    def run(self) -> DrillReport:
        total = len(self._names) + 2
        try:
            self._told(Stage("first uninterrupted run", 0, total, None))
            first = self._uninterrupted("reference-1")
            self._limit_s = max(_STUCK_LEAST_S, _STUCK_RUNS * first.baseline.run_s)
            self._told(Stage("second uninterrupted run", 1, total, self._estimate_s(first, self._names)))
            second = self._uninterrupted("reference-2")
        except (_Unfit, Stuck) as unfit:
            # Nothing was measured that the scenarios could be compared with.
            faults = (str(unfit),)
            return self._report([Verdict(scenario="reference", status=Status.FAILED, faults=faults)], None, False)
        yardstick, reference = self._compare_references(first, second)
        verdicts = [reference]
        for number, name in enumerate(self._names):
            left_s = self._estimate_s(first, self._names[number:]) - first.baseline.run_s
            self._told(Stage(f"{name}: {SCENARIOS[name].what}", number + 2, total, left_s))
            verdicts.append(self._play(name, first, yardstick))
        self._told(Stage("done", total, total, 0.0))
        return self._report(verdicts, first, yardstick.deterministic)

    def _report(self, verdicts: list[Verdict], first: _Ended | None, deterministic: bool) -> DrillReport:
        options = self._options
        return DrillReport(
            command=self._given,
            deterministic=deterministic,
            tolerance=0.0 if options.tolerance is None and deterministic else options.tolerance,
            steps=0 if first is None else first.baseline.steps,
            run_s=0.0 if first is None else first.baseline.run_s,
            seed=options.seed,
            verdicts=tuple(verdicts),
            folder=None if options.keep is None else str(options.keep),
            took_s=self._clock.monotonic_s() - self._begun_s,
        )

    def _estimate_s(self, first: _Ended, names: Sequence[str]) -> float:
        """Every scenario is one run, and a start for each interruption; and there is the second uninterrupted run."""
        each_s = first.baseline.run_s + self._options.times * (first.startup_s + 1.0)
        return first.baseline.run_s + len(names) * each_s

    def _course(self, name: str) -> Course:
        folder, temporary = self._scratch / name, self._temporary / str(len(list(self._temporary.iterdir())))
        folder.mkdir()
        temporary.mkdir()
        return Course(
            command=self._command, folder=folder, work=self._here if self._options.here else folder / "work",
            environment=self._environment | {"TMPDIR": str(temporary)}, clock=self._clock, crew=self._crew,
            limit_s=self._limit_s,
        )  # fmt: skip

    # ---- uninterrupted

    def _uninterrupted(self, name: str) -> _Ended:
        course = self._course(name)
        begun_s = self._clock.monotonic_s()
        attempt = course.start()
        code = attempt.wait()
        run_s = self._clock.monotonic_s() - begun_s
        life = attempt.life
        if code != EXIT_DONE:
            raise _Unfit(
                f"without any interruption the command ends with {describe_exit(code)}; its last words: {life.last_words}"
                + (
                    ""
                    if self._options.here
                    else ". (Files are looked for in a scratch folder; --here runs it where you are)"
                )
            )
        if not (Path(course.url) / "run.json").exists():
            raise _Unfit(_ignores_the_url(life.claimed))
        store = LocalStore(Path(course.url))
        try:
            state = newest_state(store)
        except RestoreError as error:
            raise _Unfit(f"the command has claimed the run and made no checkpoint: {error}") from None
        if not state.head.finished or state.step < 1:
            raise _Unfit(
                f"the command is done, but the run is not finished (step {state.step}): is the loop over run.batches(…), and the "
                "Run left normally?"
            )
        story = story_of(read_events(store))
        startup_s = life.first_step_s or 0.0
        step_s = max(0.0, run_s - startup_s) / state.step
        return _Ended(
            state, story, Baseline(state.step, run_s, step_s, story.evaluation_s > 0, life.launched), startup_s
        )

    def _compare_references(self, first: _Ended, second: _Ended) -> tuple[Yardstick, Verdict]:
        options, differences = self._options, compare(second.state, first.state)
        change = differing_figures(second.story, first.story)
        took_s = first.baseline.run_s + second.baseline.run_s
        generators = frozenset(item.name for item in differences if item.name.startswith(GENERATORS))
        if len(generators) == len(differences) and change is None:
            notes = (
                () if not generators else ("a global random generator that the training does not use is not seeded",)
            )
            verdict = Verdict(
                scenario="reference",
                status=Status.PASSED,
                notes=notes,
                same_state=True,
                took_s=took_s,
                exit_codes=(0, 0),
            )
            return Yardstick(True, options.tolerance, {}, generators), verdict
        measured = {item.name: _SPREADS * item.spread for item in differences if item.spread < float("inf")}
        unstable = frozenset(item.name for item in differences) - measured.keys()
        accepted = options.tolerance is not None and all(
            item.spread <= options.tolerance for item in differences if item.name in measured
        )
        why = why_not_deterministic(differences, change, drawn_from(second.state))
        verdict = Verdict(
            scenario="reference", status=Status.PASSED if accepted else Status.FAILED, same_state=False, took_s=took_s,
            faults=() if accepted else (f"the script is not deterministic: {why}",),
            notes=(f"not deterministic, and accepted by the tolerance: {why}",) if accepted else
            ("the other verdicts allow four times the spread of these two runs; --tolerance says what is good enough",),
            exit_codes=(0, 0),
        )  # fmt: skip
        return Yardstick(False, options.tolerance, measured, unstable), verdict

    # ---- interrupted

    def _play(self, name: str, reference: _Ended, yardstick: Yardstick) -> Verdict:
        begun_s = self._clock.monotonic_s()
        course = self._course(name)
        rng = random.Random(f"{self._options.seed} {name}")
        luck = [rng.random() for _ in range(self._options.times)]
        try:
            record = SCENARIOS[name].play(course, reference.baseline, luck)
        except Skipped as skipped:
            return Verdict(scenario=name, status=Status.SKIPPED, notes=(str(skipped),))
        except Stuck as stuck:
            return Verdict(scenario=name, status=Status.FAILED, faults=(str(stuck),))
        finally:
            self._crew.end_all()
        return judge(name, self._evidence(course, record, reference, yardstick, begun_s))

    def _evidence(
        self, course: Course, record: Record, reference: _Ended, yardstick: Yardstick, begun_s: float
    ) -> Evidence:
        store = LocalStore(Path(course.url))
        state: FinalState | None = None
        differences: list[Difference] | None = None
        try:
            state = newest_state(store)
            # A run that was broken off is not compared: everything differs.
            if state.step == reference.state.step and state.head.finished:
                found = compare(state, reference.state)
                differences = [difference for difference in found if not yardstick.forgives(difference)]
        except HoldfastError as error:
            record.faults.append(f"the run cannot be read: {error}")
        story = story_of(read_events(store))
        return Evidence(
            record=record, lives=course.lives, story=story, finished=state is not None and state.head.finished,
            step=0 if state is None else state.step, goal=reference.state.step, differences=differences,
            figure=differing_figures(reference.story, story, yardstick.figures),
            own_files=course.own_files(), took_s=self._clock.monotonic_s() - begun_s,
        )  # fmt: skip


def _ignores_the_url(claimed: bool) -> str:
    if claimed:
        return (
            "the script opens a run at a URL of its own and ignores $HOLDFAST_RUN: every attempt of the drill would work on your "
            "real run. Let the launcher choose: holdfast.Run() without a URL (it falls back to ./runs/<script>), and start it with "
            "`holdfast run --run URL -- …`"
        )
    return (
        "the script never opens a holdfast.Run: what it saves by itself cannot be checked. Add `with holdfast.Run() as run:` and "
        "run.track(…)"
    )


def _absolute(command: Sequence[str], here: Path) -> tuple[str, ...]:
    """The command as it means the same in another folder: words that are paths of something here become absolute."""

    def place(word: str, *, is_program: bool) -> str:
        option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
        is_path = bool(value) and not Path(value).is_absolute() and (here / value).exists()
        return f"{option}{equals}{here / value}" if is_path and not (is_program and "/" not in value) else word

    return tuple(place(word, is_program=number == 0) for number, word in enumerate(command))


def _clean(environment: Mapping[str, str], here: Path) -> dict[str, str]:
    """Without what another launcher has set for its own run; modules of the present folder stay importable."""
    kept = {name: value for name, value in environment.items() if not name.startswith("HOLDFAST_")}
    paths = [str(here), *filter(None, [environment.get("PYTHONPATH")])]
    interpreter = str(Path(sys.executable).parent)
    search = kept.get("PATH", os.defpath)
    # `python` in the command means the one that has holdfast, also where its environment is not activated.
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([interpreter, search]),
        "PYTHONUNBUFFERED": "1",
    }
