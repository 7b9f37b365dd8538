"""What a run of several ranks uses: agree on a step, exchange a few bytes, commit together.

    loop:  boundary → act (save, leave), at the same step on all ranks            wish → coordinator asks (agreement.py)
    open:  exchange → every rank's bytes, combined by rank 0, to all
    saver: rank 0: begin → gather → done            member: next_begin → ready → outcome

Every wait is bounded, and names the ranks that have not answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from holdfast.checkpoint.phases import Begin, Cannot, Done, HandedIn, Ready
from holdfast.core.clock import Clock
from holdfast.core.errors import RanksApart, SaveError
from holdfast.train.ranks.agreement import Questions, Stance
from holdfast.train.ranks.words import Act, Answer, Ask, Hello, Promise, Say, Told, Wish, Withdrawn, Word, decode_notice

__all__ = ["Link", "Together"]

_EXCHANGE_S = 300.0
_PATIENCE_S = 30.0
"""For an answer that only a living thread has to give."""
Combine = Callable[[list[bytes]], bytes | list[bytes]]
"""Of all ranks' payloads, in order, makes one answer for all, or one for each."""


class Link(Protocol):
    """The connections of one rank (hub.py). What cannot be delivered shows as `lost`."""

    def send(self, rank: int, word: Word) -> None: ...

    def send_all(self, word: Word) -> None: ...

    def close(self) -> None: ...


class _Heard(NamedTuple):
    """A notice that some rank has heard. `about`: kind and deadline, to the second."""

    about: tuple[str, int]
    notice: bytes
    is_passed_on: bool


class Together:
    """One rank's share in what all do. `boundary` belongs to the loop's thread; `heard` and `lost` to the link's; the rest may be
    called from any thread, `exchange` by one at a time and in the same order on all ranks."""

    def __init__(self, rank: int, size: int, clock: Clock, *, commit_timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._clock, self._commit_timeout_s = clock, commit_timeout_s
        self._condition = threading.Condition()
        self._link: Link | None = None
        self._stance = Stance()
        self._questions = Questions(size)
        self._asked_at_s = 0.0
        self._present = {0} if rank == 0 else set()
        self._gone: set[int] = set()
        self._survivors = tuple(range(size))
        self._said: dict[str, dict[int, bytes]] = {}
        self._answers: dict[str, Answer] = {}
        self._begins: dict[str, Begin] = {}
        self._handed_in: dict[str, dict[int, Ready | Cannot]] = {}
        self._outcomes: dict[str, Done] = {}
        self._told: Callable[[bytes], None] = lambda notice: None
        self._notices: dict[str, _Heard] = {}
        """Rank 0: what stands, by its id."""

    @property
    def coordinates(self) -> bool:
        return self.rank == 0

    @property
    def gone(self) -> list[int]:
        """Ranks whose connection has broken; for a member, only rank 0's can."""
        with self._condition:
            return sorted(self._gone)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Who makes the next checkpoint: all, but for those without which one has failed."""
        return self._survivors

    def connect(self, link: Link, told: Callable[[bytes], None]) -> None:
        """`told` is called with every notice that another rank has heard, from the link's thread."""
        self._told = told
        with self._condition:
            self._link = link
            self._condition.notify_all()

    def wait_for_all(self, timeout_s: float) -> None:
        """Rank 0: until every member has connected. Raises RanksApart."""
        with self._condition:
            if not self._condition.wait_for(lambda: len(self._present) == self.size, timeout_s):
                missing = sorted(set(range(self.size)) - self._present)
                raise RanksApart(f"{_ranks(missing)} did not join the run within {timeout_s:g} s")

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    # ---- what the link's thread brings

    def heard(self, rank: int, word: Word) -> None:
        """From `rank`; for a member that is always 0."""
        if isinstance(word, Ask):
            self._send(0, self._stance.asked(word))
        elif isinstance(word, Act):
            self._stance.decided(word)
        elif isinstance(word, Withdrawn):
            self._stance.withdrawn(word.question)
        elif isinstance(word, Promise):
            with self._condition:
                act = self._questions.promised(rank, word)
            self._decide(act)
        elif isinstance(word, Wish):
            self.wish(word)
        elif isinstance(word, Told):
            self._told(word.notice)
            if self.coordinates:
                self._pass_on(word.notice)
        else:
            self._keep(rank, word)

    def _keep(self, rank: int, word: Word) -> None:
        with self._condition:
            if isinstance(word, Hello):
                self._present.add(rank)
            elif isinstance(word, Say):
                self._said.setdefault(word.name, {})[rank] = word.payload
            elif isinstance(word, Answer):
                self._answers[word.name] = word
            elif isinstance(word, Begin):
                self._begins[word.name] = word
            elif isinstance(word, Ready | Cannot) and word.name in self._handed_in:
                self._handed_in[word.name][rank] = word
            elif isinstance(word, Done):
                self._go_on_without(word.gone)
                self._outcomes[word.name] = word
            self._condition.notify_all()

    def lost(self, rank: int) -> None:
        with self._condition:
            self._gone.add(rank)
            act = self._questions.lost(rank) if self.coordinates else None
            self._condition.notify_all()
        self._decide(act)

    # ---- the same step

    def boundary(self, step: int) -> Act | None:
        """Step number `step` is complete on this rank. What all do at this boundary."""
        act = self._stance.boundary(step, _PATIENCE_S)
        if self.coordinates:
            self._look_after_questions(acted=act is not None)
        return act

    def wish(self, wish: Wish, way: str = "") -> None:
        """Let all do this at a common step, soon. Wishing again for what is being asked changes nothing."""
        if not self.coordinates:
            self._send(0, wish)
            return
        with self._condition:
            ask = self._questions.wish(wish, way)
            if ask is not None:
                self._asked_at_s = self._clock.monotonic_s()
        self._ask(ask)

    def tell(self, notice: bytes) -> None:
        """A notice that this rank has heard concerns all."""
        if self.coordinates:
            self._pass_on(notice)
        else:
            self._send(0, Told(notice))

    def _pass_on(self, notice: bytes) -> None:
        """Rank 0: what one rank has heard concerns all. Where a whole job is told the same, each of its ranks says so: one of those
        is passed on, and another when it moves or is withdrawn."""
        news = decode_notice(notice)
        about = (news.kind, round(news.deadline_unix_s or 0.0))
        with self._condition:
            before = self._notices.pop(news.id, None)
            is_known = before is not None and before.is_passed_on
            words = []
            if news.kind != "withdrawn":
                is_passed_on = is_known or not self._is_passed_on(about)
                self._notices[news.id] = _Heard(about, notice, is_passed_on)
                if is_passed_on and (before is None or before[::2] != (about, True)):
                    words.append(notice)
            if before is not None and is_known and not self._is_passed_on(before.about):
                words += self._pass_on_another(before.about)
            if news.kind == "withdrawn" and is_known:
                words.append(notice)
        for word in words:
            self._send_all(Told(word))

    def _is_passed_on(self, about: tuple[str, int]) -> bool:
        return any(other.is_passed_on and other.about == about for other in self._notices.values())

    def _pass_on_another(self, about: tuple[str, int]) -> list[bytes]:
        for id, other in self._notices.items():
            if other.about == about:
                self._notices[id] = other._replace(is_passed_on=True)
                return [other.notice]
        return []

    def _ask(self, ask: Ask | None) -> None:
        if ask is None:
            return
        mine = self._stance.asked(ask)
        self._send_all(ask)
        with self._condition:
            act = self._questions.promised(0, mine)
        self._decide(act)

    def _decide(self, act: Act | None) -> None:
        if act is not None:
            self._send_all(act)
            self._stance.decided(act)

    def _look_after_questions(self, *, acted: bool) -> None:
        if not acted and self._questions.open is None:
            return
        expired = ask = None
        with self._condition:
            if acted:
                ask = self._questions.acted()
                self._asked_at_s = self._clock.monotonic_s()
            elif self._clock.monotonic_s() - self._asked_at_s > _PATIENCE_S:
                expired = self._questions.expired()
        self._ask(ask)
        if expired is not None:
            self._send_all(expired[0])
            self._stance.withdrawn(expired[0].question)

    # ---- exchanges

    def exchange(
        self, name: str, payload: bytes, combine: Combine, *, what: str, timeout_s: float = _EXCHANGE_S
    ) -> bytes:
        """Every rank calls this at the same place, under a name that is used once. Returns what rank 0's `combine` makes of all
        payloads, for all or for this rank.

        Raises RanksApart on all ranks that are still there when one is missing; and what `combine` raises, as RanksApart on the
        others.
        """
        if not self.coordinates:
            self._send(0, Say(name, payload))
            return self._answer(name, what, timeout_s)
        try:
            combined = combine(self._everybody(name, payload, what, timeout_s))
        except Exception as error:
            self._send_all(Answer(name, b"", f"{type(error).__name__}: {error}"))
            raise
        if isinstance(combined, bytes):
            self._send_all(Answer(name, combined))
            return combined
        for rank in range(1, self.size):
            self._send(rank, Answer(name, combined[rank]))
        return combined[0]

    def _everybody(self, name: str, mine: bytes, what: str, timeout_s: float) -> list[bytes]:
        with self._condition:
            said = self._said.setdefault(name, {})
            said[0] = mine
            in_time = self._condition.wait_for(
                lambda: len(said) == self.size or bool(self._gone - said.keys()), timeout_s
            )
            missing = sorted(set(range(self.size)) - said.keys())
            del self._said[name]
        if missing:
            gone = sorted(self._gone & set(missing))
            why = (
                f"{_ranks(gone)} has ended"
                if in_time and gone
                else f"no answer of {_ranks(missing)} in {timeout_s:g} s"
            )
            raise RanksApart(f"{what}: {why}")
        return [said[rank] for rank in range(self.size)]

    def _answer(self, name: str, what: str, timeout_s: float) -> bytes:
        with self._condition:
            # Rank 0 waits itself for the slowest rank, and says so.
            self._condition.wait_for(lambda: name in self._answers or bool(self._gone), 2 * timeout_s)
            answer = self._answers.pop(name, None)
        if answer is None:
            raise RanksApart(f"{what}: rank 0 {'has ended' if self._gone else 'did not answer'}")
        if answer.error:
            raise RanksApart(f"{what}: {answer.error}")
        return answer.payload

    # ---- commits, in the savers' threads

    def begin(self, word: Begin) -> None:
        """Rank 0: phase one of a save."""
        with self._condition:
            self._handed_in[word.name] = {}
        self._send_all(word)

    def gather(self, name: str, ranks: Sequence[int]) -> HandedIn:
        """Rank 0: what the members among `ranks` hand in, once all have, or are gone, or the time is over."""
        members = set(ranks) - {0}
        with self._condition:
            found = self._handed_in[name]
            # Asked at each word: what it costs must not grow with the ranks.
            self._condition.wait_for(
                lambda: len(found) >= len(members) - len(members & (self._gone - found.keys())), self._commit_timeout_s
            )
            found = self._handed_in.pop(name)
            gone, slow = sorted(members & self._gone - found.keys()), sorted(members - found.keys() - self._gone)
        missing = None
        if gone:
            missing = f"{_ranks(gone)} ended before its part of the checkpoint was durable"
        elif slow:
            missing = (
                f"{_ranks(slow)} did not make its part of the checkpoint durable within {self._commit_timeout_s:g} s "
                "(commit_timeout)"
            )
        return HandedIn(found, missing, tuple(gone))

    def done(self, word: Done) -> None:
        """Rank 0: the end of a save."""
        self._go_on_without(word.gone)
        self._send_all(word)

    def _go_on_without(self, gone: Sequence[int]) -> None:
        if gone:
            self._survivors = tuple(rank for rank in self._survivors if rank not in gone)

    def next_begin(self, step: int, take: int) -> Begin:
        """Member: the save of that snapshot, or of a later one. Those of earlier ones are turned down. Raises SaveError."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._begins) or bool(self._gone), self._commit_timeout_s)
                if not self._begins:
                    why = "is gone" if self._gone else f"has not begun it within {self._commit_timeout_s:g} s"
                    raise SaveError(f"the save of step {step} was not made: rank 0 {why}")
                begin = self._begins.pop(next(iter(self._begins)))
            if (begin.step, begin.take) >= (step, take):
                return begin
            self.hand_in(
                Cannot(name=begin.name, why=f"the snapshot of step {begin.step} is gone", left=[], is_gone=True)
            )

    def put_back(self, begin: Begin) -> None:
        """Member: this save is of a later snapshot than the one at hand."""
        with self._condition:
            self._begins = {begin.name: begin, **self._begins}

    def hand_in(self, word: Ready | Cannot) -> None:
        """Member: the end of phase one."""
        self._send(0, word)

    def outcome(self, name: str) -> Done:
        """Member: the end of the save. Raises SaveError when rank 0 is gone: whether the save counts is then not known here."""
        with self._condition:
            # Rank 0's own wait for the slowest, and then its head.
            self._condition.wait_for(lambda: name in self._outcomes or bool(self._gone), 2 * self._commit_timeout_s)
            done = self._outcomes.pop(name, None)
        if done is None:
            raise SaveError(f"{name}: rank 0 {'is gone' if self._gone else 'did not say what became of it'}")
        return done

    # ---- sending

    def _send(self, rank: int, word: Word) -> None:
        if self._link is not None:
            self._link.send(rank, word)

    def _send_all(self, word: Word) -> None:
        if self._link is not None:
            self._link.send_all(word)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"
