"""How ranks come to act at the same step boundary without a word per step. State machines; who carries the words is not known here.

    wish → ask all → each promises: step c is complete, and I do not pass boundary c + 1 before I know
         → all have promised: act at boundary max(c) + 1, which nobody has passed → each acts when its loop gets there

A loop pays one look at a variable for each step. It waits only when the answer takes longer than its step.
"""

from __future__ import annotations

import threading

from holdfast.train.ranks.words import Act, Ask, Promise, Wish, Withdrawn

__all__ = ["Questions", "Stance"]


class Stance:
    """One rank's side. `boundary` belongs to its loop's thread, the rest to the thread that hears words.

    Invariant: a loop that has promised at step c does not pass boundary c + 1 while the question is open. `_open` is written
    before `completed` is read, and `completed` before `_open` is read, so one of the two threads always sees the other.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.completed = 0
        self._open = False
        self._question: int | None = None
        self._limit = 0
        self._decided: list[Act] = []
        """What this rank has still to do, in the order of steps: the next question may come before it has acted on the last."""

    def boundary(self, step: int, patience_s: float) -> Act | None:
        """Step number `step` is complete. What all ranks do at this very boundary; None: go on.

        Waits for an answer for `patience_s` at most; then the question is given up, since whoever asked is not there any more.
        """
        if self.reached(step):
            return None
        with self._condition:
            if not self._condition.wait_for(lambda: self.may_pass(step), patience_s):
                self._question = None
            act = self._decided.pop(0) if self._decided and self._decided[0].step <= step else None
            self._open = self._question is not None or bool(self._decided)
            return act

    def reached(self, step: int) -> bool:
        """Note that the loop has come to this boundary. True: nothing is being asked, and it may go on."""
        self.completed = step
        return not self._open

    def may_pass(self, step: int) -> bool:
        """Whether nothing that this rank has promised keeps it at this boundary."""
        return self._question is None or step < self._limit

    def asked(self, ask: Ask) -> Promise:
        with self._condition:
            self._open = True
            self._question = ask.question
            self._limit = self.completed + 1
            return Promise(ask.question, self._limit - 1)

    def decided(self, act: Act) -> None:
        with self._condition:
            # Who has given up waiting may be past that step.
            if self._question == act.question:
                self._question = None
                self._decided.append(act)
                self._condition.notify_all()

    def withdrawn(self, question: int) -> None:
        with self._condition:
            if self._question == question:
                self._question = None
                self._condition.notify_all()


class Questions:
    """The coordinator's side. Not thread-safe: its owner holds a lock.

    One question at a time. A wish that comes while one is open joins it: to leave outranks to save. One that comes after the
    decision is asked when this rank has acted (`acted`).
    """

    def __init__(self, size: int) -> None:
        self._alive = set(range(size))
        self._number = 0
        self._wish: Wish | None = None
        self._way = ""
        self._promises: dict[int, int] = {}
        self._is_open = self._is_decided = False
        self._next: tuple[Wish, str] | None = None

    @property
    def open(self) -> int | None:
        """The number of the question that is not decided."""
        return self._number if self._is_open and not self._is_decided else None

    def wish(self, wish: Wish, way: str = "") -> Ask | None:
        """What to ask all, or None where that is being asked already."""
        if self._is_open and self._is_decided:
            # A save that was wished for since is made at the step that is decided; to leave comes after it.
            if wish.kind == "leave" and self._wish is not None and self._wish.kind == "save":
                self._next = (wish, way)
            return None
        assert not (self._is_open and self._wish is None)
        current = (self._wish, self._way) if self._is_open and self._wish is not None else None
        self._wish, self._way = _stronger(current, (wish, way))
        if self._is_open:
            return None
        self._number += 1
        self._is_open, self._is_decided, self._promises = True, False, {}
        return Ask(self._number)

    def promised(self, rank: int, promise: Promise) -> Act | None:
        """The decision, when this was the last promise that was missing."""
        if promise.question == self.open and rank in self._alive:
            self._promises[rank] = promise.step
        return self._decide()

    def lost(self, rank: int) -> Act | None:
        """A rank is gone: nobody waits for it any more."""
        self._alive.discard(rank)
        self._promises.pop(rank, None)
        return self._decide()

    def expired(self) -> tuple[Withdrawn, list[int]] | None:
        """Nobody waits any longer. Who has not answered; None where no question is open."""
        if self.open is None:
            return None
        missing = sorted(self._alive - self._promises.keys())
        self._is_open, self._wish = False, None
        return Withdrawn(self._number), missing

    def acted(self) -> Ask | None:
        """This rank has done what was decided; what was wished meanwhile comes next."""
        self._is_open = self._is_decided = False
        self._wish, self._way = None, ""
        following, self._next = self._next, None
        return None if following is None else self.wish(*following)

    def _decide(self) -> Act | None:
        # Who has promised is alive, so counting them is enough: every promise of every rank comes by here.
        if self.open is None or self._wish is None or len(self._promises) < len(self._alive):
            return None
        self._is_decided = True
        step = max(self._promises.values()) + 1
        return Act(self._number, step, self._wish.kind, self._wish.reason, self._wish.code, self._way)


def _stronger(one: tuple[Wish, str] | None, other: tuple[Wish, str]) -> tuple[Wish, str]:
    if one is None or (one[0].kind == "save" and other[0].kind == "leave"):
        return other
    return one
