"""What happens to an action: faults of the store at chosen operations, a crash, or somebody else's whole action in between.

A stroke waits, from its operation on, for the first one that it suits. So a short list of small numbers hits what matters, and
shrinks well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache

from hypothesis import strategies as st
from interleaved import Dead
from places import WireStrike

from holdfast.core.errors import Fenced, IntegrityError, PermissionDenied, RestoreError, SaveError, StoreFull
from holdfast.testing.faulty_store import METHODS, WRITES, Fault, Operation, Plan, always, seeded
from holdfast.testing.http_faults import HttpFault

__all__ = ["CALM", "Crash", "Luck", "Meanwhile", "Mood", "Strokes", "lucks"]


class Crash(Enum):
    HERE = "the process ends before this operation"


class Meanwhile(Enum):
    """What others do between two operations, from beginning to end."""

    OVERTAKEN = "the other attempt claims anew, saves twice and sweeps, so that older heads are pruned"
    CLAIMED = "the other attempt claims anew"
    SAVED = "the other attempt goes on with the claim that it has"
    READ = "somebody restores"
    LANDED = "everything that was late lands"


class Mood(Enum):
    """What the store is like for as long as the action lasts."""

    GOOD = "no fault but the strokes"
    NO_DELETE = "no permission to delete"
    FULL = "no room for another data object"
    THROTTLED = "every third request or so fails, some of them after they were applied"
    CUT_OFF = "from the first conditional write on no answer comes; that write was applied, and nothing after it is"
    CUT_OFF_BEFORE = "the same, but the conditional writes are only carried out when the test says so"
    SLUGGISH = "requests that the client gives up and the service carries out later"


Stroke = Fault | Crash | Meanwhile

_READS = frozenset({"get", "read_into"})
_SUITS: dict[Fault, frozenset[str]] = {
    Fault.UNAVAILABLE_BEFORE: METHODS,
    Fault.UNAVAILABLE_AFTER: METHODS,
    Fault.TIMED_OUT: METHODS,
    Fault.SLOW: METHODS,
    Fault.DENIED: METHODS,
    Fault.LATE: WRITES,
    Fault.TAKEN_BY_ITSELF: frozenset({"put_new"}),
    Fault.BROKEN_OFF: _READS,
    Fault.TRUNCATED: _READS,
    Fault.FLIPPED: _READS,
    Fault.STALE: frozenset({"list"}),
    Fault.FULL: frozenset({"put", "put_new"}),
}
_CORRUPTING = frozenset({Fault.TRUNCATED, Fault.FLIPPED})
_SHORTENING = frozenset({HttpFault.SHORTENED})
_WIRE_FAULTS = (
    HttpFault.LOST_ANSWER,
    HttpFault.CONFLICT,
    HttpFault.CONFLICT_AFTER,
    HttpFault.SLOW_DOWN,
    HttpFault.SLOW_DOWN_AFTER,
    HttpFault.INTERNAL_AFTER,
    HttpFault.RESET_BEFORE,
    HttpFault.RESET_IN_REQUEST,
    HttpFault.RESET_IN_ANSWER,
    HttpFault.TRUNCATED,
    HttpFault.SHORTENED,
    HttpFault.BAD_GATEWAY,
    HttpFault.FORBIDDEN,
)


@dataclass(frozen=True)
class Luck:
    mood: Mood = Mood.GOOD
    strokes: tuple[tuple[int, Stroke], ...] = ()
    wire: tuple[WireStrike, ...] = ()

    @property
    def calm(self) -> bool:
        """Nothing happens: then every action has one right outcome."""
        return self == CALM

    @property
    def corrupts(self) -> bool:
        """Some bytes arrive wrong, or a list is old: then a restore may fall back to an older checkpoint."""
        faults = {stroke for _, stroke in self.strokes}
        return bool(faults & {*_CORRUPTING, Fault.STALE}) or any(fault in _SHORTENING for _, fault in self.wire)

    def explains(self, error: BaseException) -> bool:
        """Whether an action under this luck may end so. Being fenced is nobody's bad luck: who is told so is checked elsewhere."""
        faults = {stroke for _, stroke in self.strokes} | {fault for _, fault in self.wire}
        match error:
            case Dead():
                return Crash.HERE in faults
            case IntegrityError() | RestoreError() | SaveError():
                return self.corrupts
            case StoreFull():
                return Fault.FULL in faults or self.mood is Mood.FULL
            case PermissionDenied():
                return bool(faults & {Fault.DENIED, HttpFault.FORBIDDEN}) or self.mood is Mood.NO_DELETE
        return isinstance(error, Fenced) or not self.calm


CALM = Luck()


class Strokes:
    """The plan of one action's store.

    Left out, because the protocol does not promise to bear it: stale lists for who writes, except of what is only garbage to be
    found; and a head that arrives wrong twice in a row, which counts as one that is wrong.
    """

    def __init__(self, luck: Luck, meanwhile: Callable[[Meanwhile], None], *, writes: bool) -> None:
        self.dead = False
        self._left = list(luck.strokes)
        self._background = _background(luck.mood)
        self._meanwhile = meanwhile
        self._writes = writes
        self._spoilt_head = False
        self._count = 0

    def __call__(self, operation: Operation) -> Fault | None:
        if self.dead:
            raise Dead
        number = self._count
        self._count += 1
        while True:
            due = next((each for each in self._left if each[0] <= number and self._suits(each[1], operation)), None)
            if due is None:
                return self._background(operation)
            self._left.remove(due)
            stroke = due[1]
            if isinstance(stroke, Crash):
                self.dead = True
                raise Dead
            if isinstance(stroke, Fault):
                self._spoilt_head |= stroke in _CORRUPTING and operation.key.startswith("heads/")
                return stroke
            self._meanwhile(stroke)

    def _suits(self, stroke: Stroke, operation: Operation) -> bool:
        if not isinstance(stroke, Fault):
            return True
        if operation.method not in _SUITS[stroke]:
            return False
        if stroke is Fault.STALE and self._writes:
            return operation.key in ("data/", "checkpoints/")
        return not (stroke in _CORRUPTING and operation.key.startswith("heads/") and self._spoilt_head)


def _cut_off(of_the_write: Fault) -> Plan:
    """The network goes away in the very moment of the commit."""
    gone = False

    def plan(operation: Operation) -> Fault | None:
        nonlocal gone
        if operation.method == "put_new" and (not gone or of_the_write is Fault.LATE):
            gone = True
            return of_the_write
        return Fault.UNAVAILABLE_BEFORE if gone else None

    return plan


def _background(mood: Mood) -> Plan:
    match mood:
        case Mood.GOOD:
            return lambda operation: None
        case Mood.NO_DELETE:
            return always(Fault.DENIED, "delete")
        case Mood.FULL:
            return lambda operation: Fault.FULL if operation.method == "put" else None
        case Mood.THROTTLED:
            return seeded(1, 0.3, (Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.TIMED_OUT, Fault.SLOW))
        case Mood.CUT_OFF:
            return _cut_off(Fault.UNAVAILABLE_AFTER)
        case Mood.CUT_OFF_BEFORE:
            return _cut_off(Fault.LATE)
        case Mood.SLUGGISH:
            return seeded(2, 0.3, (Fault.LATE,))


_STROKES: st.SearchStrategy[Stroke] = st.sampled_from([*_SUITS, *Meanwhile, *Meanwhile, Crash.HERE, Crash.HERE])


@cache
def lucks(*, network: bool) -> st.SearchStrategy[Luck]:
    """Calm in one case of three; else the network, a bad mood or some strokes, and mostly strokes."""
    strokes = st.lists(st.tuples(st.integers(0, 15), _STROKES), min_size=1, max_size=3).map(tuple)
    moods = st.sampled_from([mood for mood in Mood if mood is not Mood.GOOD])
    choices = [st.just(CALM), st.builds(Luck, strokes=strokes), st.builds(Luck, strokes=strokes)]
    if network:
        strikes = st.lists(st.tuples(st.integers(0, 15), st.sampled_from(_WIRE_FAULTS)), min_size=1, max_size=2)
        wire = strikes.filter(lambda drawn: sum(fault in _SHORTENING for _, fault in drawn) <= 1).map(tuple)
        choices += [st.just(CALM), st.builds(Luck, wire=wire), st.builds(Luck, wire=wire, strokes=strokes)]
    return st.one_of(*choices, st.builds(Luck, mood=moods, strokes=st.one_of(st.just(()), strokes)))
