"""From the evidence of a scenario to a verdict: what is wrong, in words that say what to look for. Pure.

Evidence (ends of processes, ledger, differences of the state) → faults, the most telling first → Verdict
"""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from holdfast.core.contract import EXIT_DONE, EXIT_FENCED, EXIT_PREEMPTED
from holdfast.drill.attempt import Life
from holdfast.drill.report import Status, Verdict
from holdfast.drill.scenarios import Record
from holdfast.drill.state import GENERATORS, Difference
from holdfast.drill.story import FigureChange, Story, miscounted
from holdfast.policy.restart import describe_exit

__all__ = ["Evidence", "Yardstick", "judge", "why_not_deterministic"]

_SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What the same means. `tolerance` is the user's, relative; None: `measured` has the spread that two uninterrupted runs showed,
    by name. Names in `unstable` are of no use: they differ from run to run and have no measure."""

    deterministic: bool
    tolerance: float | None
    measured: Mapping[str, float]
    unstable: frozenset[str]

    @property
    def figures(self) -> float:
        """The tolerance for logged figures; infinite where runs differ by themselves and nobody has said by how much they may."""
        if self.deterministic:
            return self.tolerance or 0.0
        return math.inf if self.tolerance is None else self.tolerance

    def forgives(self, difference: Difference) -> bool:
        if difference.name in self.unstable:
            return True
        allowed = self.measured.get(difference.name, 0.0) if self.tolerance is None else self.tolerance
        return difference.spread <= allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is there after a scenario. `differences` are those beyond the yardstick; None where the run has no final state."""

    record: Record
    lives: Sequence[Life]
    story: Story
    finished: bool
    step: int
    goal: int
    differences: Sequence[Difference] | None
    figure: FigureChange | None
    own_files: Sequence[str]
    took_s: float


def judge(name: str, evidence: Evidence) -> Verdict:
    record, lives = evidence.record, list(evidence.lives)
    faults = [*_wrong_ends(evidence), *record.faults]
    faults += _state_faults(evidence) if evidence.finished else _unfinished(evidence)
    faults += miscounted(evidence.story)
    lost = _lost(lives)
    for strike in record.strikes:
        lost_here = lost.get(lives.index(strike.life), 0)
        if lost_here and not strike.may_lose:
            faults.append(
                f"{_steps(lost_here)} computed again although there was time to save: step {strike.life.reached_step} was reached"
            )
    if evidence.story.fell_back < record.must_fall_back:
        faults.append(
            f"{record.must_fall_back} checkpoints were damaged, and {evidence.story.fell_back} times the run says that it fell back"
        )
    resumed = [life.first_step_s for life in lives[1:] if life.first_step_s is not None]
    if not record.strikes:
        return Verdict(
            scenario=name, status=Status.FAILED if faults else Status.SKIPPED, faults=tuple(faults), took_s=evidence.took_s,
            notes=("the training was over before it could be interrupted",),
        )  # fmt: skip
    return Verdict(
        scenario=name,
        status=Status.FAILED if faults else Status.PASSED,
        faults=tuple(faults),
        notes=tuple(dict.fromkeys([*record.notes, *_launchers_codes(evidence)])),
        interruptions=len(record.strikes),
        exit_codes=tuple(life.exit_code for life in lives if life.exit_code is not None),
        same_state=evidence.differences is not None and not evidence.differences and evidence.finished,
        lost_steps=sum(lost.values()),
        notice_to_durable_s=evidence.story.notice_to_durable_s,
        first_step_s=max(resumed, default=None),
        took_s=evidence.took_s,
    )


def _lost(lives: Sequence[Life]) -> dict[int, int]:
    """By life: how many of its steps the next one that restored had to compute again."""
    lost = {}
    for number, life in enumerate(lives):
        following = next((other for other in lives[number + 1 :] if other.claimed), None)
        if life.claimed and following is not None:
            lost[number] = max(0, life.reached_step - max(0, following.restored_step))
    return lost


def _wrong_ends(evidence: Evidence) -> list[str]:
    faults = []
    struck = {id(strike.life): strike for strike in evidence.record.strikes}
    for number, life in enumerate(evidence.lives, 1):
        is_last = number == len(evidence.lives)
        strike = struck.get(id(life))
        right = strike.right_codes if strike is not None else frozenset({EXIT_DONE, EXIT_PREEMPTED})
        code = life.left_with(evidence.story.ends)
        if code == EXIT_DONE and not is_last and not (strike and EXIT_FENCED in strike.right_codes):
            faults.append(
                f"attempt {number} left with exit code 0 after {_steps(life.reached_step, 'step')}, and the run is not finished: "
                "whoever started it takes it for done. Let holdfast handle SIGTERM (no handler of the script's own), or leave "
                f"with exit code {EXIT_PREEMPTED}"
            )
        elif code is not None and code not in right:
            faults.append(f"attempt {number}: {_wrong_end(code, right, life.last_words)}")
    return faults


def _launchers_codes(evidence: Evidence) -> list[str]:
    """Where the exit codes that are shown are a launcher's, what its ranks have recorded."""
    pairs = [(life.exit_code, life.left_with(evidence.story.ends)) for life in evidence.lives]
    return [
        f"exit code {shown} is the launcher's own: its ranks recorded that they left with {told}"
        for shown, told in pairs
        if shown != told
    ]


def _wrong_end(code: int, right: frozenset[int], tail: str) -> str:
    if code == -signal.SIGTERM:
        return (
            "SIGTERM killed it and nothing was saved. Is the command a shell script that does not `exec` the training, or does "
            "something reset the handler?"
        )
    if EXIT_FENCED in right:
        return f"{describe_exit(code)} instead of {EXIT_FENCED}: another attempt owned the run, and it did not notice"
    expected = " or ".join(str(each) for each in sorted(right))
    return f"{describe_exit(code)} instead of {expected}" + (f"; its last words: {tail}" if tail else "")


def _unfinished(evidence: Evidence) -> list[str]:
    last = [life.left_with(evidence.story.ends) for life in evidence.lives[-1:]]
    if any(code not in (EXIT_DONE, EXIT_PREEMPTED, None) for code in last):
        return [f"the run is not finished: it stands at step {evidence.step} of {evidence.goal}"]
    return [f"the command is done, but the run is not finished: it stands at step {evidence.step} of {evidence.goal}"]


def _state_faults(evidence: Evidence) -> list[str]:
    faults = []
    if evidence.step != evidence.goal:
        what = "skipped" if evidence.step < evidence.goal else "repeated"
        faults.append(f"the run has {evidence.step} steps instead of {evidence.goal}: samples were {what}")
    differences = evidence.differences or ()
    change = evidence.figure
    if differences:
        where = f"; {_where(change)}" if change else "; no logged figure says from where on (run.log(loss=loss))"
        faults.append(f"the final state is another one: {_names(differences)}{where}. {_cause(evidence)}")
    elif change is not None:
        faults.append(f"the final state is the same, but {_where(change)}: other samples, or another evaluation")
    return faults


def _where(change: FigureChange) -> str:
    more = f" ({change.count} figures in all)" if change.count > 1 else ""
    resumed = f", where attempt {change.attempt} had resumed at step {change.resumed_at}" if change.attempt > 1 else ""
    return (
        f"first, {change.name} of step {change.step} is {change.now:.9g} instead of {change.before:.9g}{resumed}{more}"
    )


def _cause(evidence: Evidence) -> str:
    files = ", ".join(evidence.own_files[:_SHOWN_NAMES])
    if files:
        return (
            f"The script keeps files of its own ({files}): if it reads them back at its start, that state is older or newer than "
            "the checkpoint, or torn. Track what is in them instead. If it does not read them, something else that it needs is not "
            "tracked (a counter, a generator of its own): run.track(…)"
        )
    plain = [difference.name for difference in evidence.differences or () if "elements differ" not in difference.text]
    hint = f"It shows in {plain[0]}. " if plain else ""
    return (
        f"{hint}Something that the script needs is not in the checkpoint: a counter, a generator of its own, an average, a "
        "dataset's state. Pass it to run.track(…)"
    )


def _names(differences: Sequence[Difference]) -> str:
    shown = [f"{difference.name} ({difference.text})" for difference in differences[:_SHOWN_NAMES]]
    more = len(differences) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _steps(count: int, noun: str = "step") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def why_not_deterministic(
    differences: Sequence[Difference], change: FigureChange | None, drawn: Collection[str]
) -> str:
    """Two uninterrupted runs of one script have differed: what is most likely behind it. `drawn`: global generators in use."""
    names = {difference.name for difference in differences}
    tracked = [item for item in differences if not item.name.startswith((GENERATORS, "seed", "position"))]
    said = f"two uninterrupted runs differ: {_names(tracked or differences)}"
    if change is not None:
        said += f"; first, {change.name} of step {change.step} is {change.now:.9g} and {change.before:.9g}"
    if "seed" in names:
        cause = "They had different seeds: call torch.manual_seed(…) before the model is made"
    elif "numpy" in drawn and any(name.startswith(f"{GENERATORS}.numpy") for name in names):
        cause = "numpy's global generator is not seeded and the loop draws from it: numpy.random.seed(…)"
    elif "python" in drawn and any(name.startswith(f"{GENERATORS}.python") for name in names):
        cause = "python's global generator is not seeded and the loop draws from it: random.seed(…)"
    else:
        cause = (
            "Look for a generator of the script's own without a seed (numpy.random.default_rng()), the time, the order of a set, "
            "or kernels that are not deterministic: torch.use_deterministic_algorithms(True), torch.set_num_threads(1)"
        )
    return f"{said}. {cause}"
