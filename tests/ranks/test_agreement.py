"""Ranks in any order, words as late as may be: all act at one step, nobody passes it, nobody waits for ever."""

from __future__ import annotations

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.train.ranks.agreement import Questions, Stance
from holdfast.train.ranks.words import Act, Ask, Promise, Wish, Withdrawn, Word


class World:
    """Ranks and the words between them, moved one at a time. Each pair of ranks keeps its order, as a connection does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stances = [Stance() for _ in range(size)]
        self.questions = Questions(size)
        self.steps = [0] * size
        self.to_rank: list[deque[Word]] = [deque() for _ in range(size)]
        self.to_chair: list[deque[Word]] = [deque() for _ in range(size)]
        self.acts: list[list[tuple[int, Act]]] = [[] for _ in range(size)]
        self.gone: set[int] = set()
        self.words = 0

    def tell_all(self, word: Word | None) -> None:
        if word is None:
            return
        for rank in range(self.size):
            if rank not in self.gone:
                self.words += 1
                self.to_rank[rank].append(word)

    def wish(self, kind: str) -> None:
        self.tell_all(self.questions.wish(Wish(kind, kind)))  # type: ignore[arg-type]

    def hear(self, rank: int) -> None:
        if not self.to_rank[rank] or rank in self.gone:
            return
        word = self.to_rank[rank].popleft()
        if isinstance(word, Ask):
            self.words += 1
            self.to_chair[rank].append(self.stances[rank].asked(word))
        elif isinstance(word, Act):
            self.stances[rank].decided(word)
        elif isinstance(word, Withdrawn):
            self.stances[rank].withdrawn(word.question)

    def collect(self, rank: int) -> None:
        if self.to_chair[rank]:
            word = self.to_chair[rank].popleft()
            assert isinstance(word, Promise)
            self.tell_all(self.questions.promised(rank, word))

    def step(self, rank: int) -> None:
        """The loop goes on by one step, if it may: it stands where a thread would wait."""
        stance = self.stances[rank]
        if rank in self.gone or any(act.kind == "leave" for _, act in self.acts[rank]):
            return
        reached = self.steps[rank] + 1
        if not stance.reached(reached) and not stance.may_pass(reached):
            return
        self.steps[rank] = reached
        act = stance.boundary(reached, patience_s=0.0)
        if act is not None:
            self.acts[rank].append((reached, act))
            if rank == 0:
                self.tell_all(self.questions.acted())

    def lose(self, rank: int) -> None:
        if rank not in self.gone:
            self.gone.add(rank)
            self.tell_all(self.questions.lost(rank))

    def settle(self) -> None:
        """Everything is delivered, and every loop goes on in lockstep: what was wished for must come to pass."""
        for _ in range(20 * self.size):
            for rank in range(self.size):
                while self.to_rank[rank] and rank not in self.gone:
                    self.hear(rank)
                while self.to_chair[rank]:
                    self.collect(rank)
            slowest = min(self.steps[rank] for rank in range(self.size) if rank not in self.gone)
            for rank in range(self.size):
                if self.steps[rank] <= slowest:
                    self.step(rank)


@given(size=st.integers(1, 5), seed=st.integers(0, 2**32), lead=st.integers(0, 3), losing=st.booleans())
@settings(max_examples=300, deadline=None)
def test_all_act_at_one_step(size: int, seed: int, lead: int, losing: bool) -> None:
    rng = random.Random(seed)
    world = World(size)
    wished = 0
    for _ in range(rng.randrange(20, 150)):
        rank = rng.randrange(size)
        move = rng.random()
        if move < 0.35:
            # Collectives keep ranks together: nobody is more than `lead` + 1 steps ahead.
            if world.steps[rank] <= min(s for other, s in enumerate(world.steps) if other not in world.gone) + lead:
                world.step(rank)
        elif move < 0.6:
            world.hear(rank)
        elif move < 0.85:
            world.collect(rank)
        elif move < 0.97:
            wished += 1
            world.wish("leave" if rng.random() < 0.1 else "save")
        elif losing and rank > 0:
            world.lose(rank)
    world.settle()
    alive = [rank for rank in range(size) if rank not in world.gone]
    first = [(step, act.kind, act.question) for step, act in world.acts[0]]
    assert bool(wished) == bool(first)
    for rank in alive:
        for step, act in world.acts[rank]:
            assert step == act.step, "a rank passed the step that it had promised not to pass"
        assert [(step, act.kind, act.question) for step, act in world.acts[rank]] == first
    assert world.questions.open is None


def test_a_thousand_ranks_say_three_words_each() -> None:
    """Ask, promise, act: the number of words grows as the number of ranks."""
    counts = {}
    for size in (16, 128, 1024):
        world = World(size)
        world.wish("save")
        for _ in range(3):
            for rank in range(size):
                world.hear(rank)
                world.collect(rank)
        assert all(len(stance._decided) == 1 for stance in world.stances)
        counts[size] = world.words / size
    assert set(counts.values()) == {3}
