"""A base that trains and trials that refer to it, interleaved at every store operation, with crashes and unclear answers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interleaved import SCALE, Suffers, World, attempt, play

from holdfast.checkpoint import heads, pack

_ALL = 1 << 30


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array in an object of its own, and old heads pruned at once."""
    monkeypatch.setattr(pack, "OBJECT_BYTES", 64)
    monkeypatch.setattr(heads, "HEADS_KEPT", 1)


def _worlds(base_saves: int) -> World:
    """A base, with checkpoints if `base_saves`, and two runs that take it."""
    base = World()
    for number in range(2):
        World(f"memory://trial-{number}", base)
    if base_saves:
        first = base.actor("0", lambda actor: attempt(actor, saves=base_saves))
        first.run(_ALL)
        assert first.outcome == "done"
    return base


def _play(world: World, cast: str, events: list[tuple[int, str]]) -> World:
    """A, B train the base; T, U the first trial, V the second."""
    programs = {
        **dict.fromkeys("AB", lambda actor: attempt(actor, saves=4)),
        **dict.fromkeys("TU", lambda actor: attempt(actor, saves=3, world=world.trials[0])),
        "V": lambda actor: attempt(actor, saves=2, world=world.trials[1]),
    }
    play(world, [world.actor(name, programs[name]) for name in cast], events)
    return world


def _operations_of_a_trial() -> int:
    world = _worlds(base_saves=2)
    alone = world.actor("T", lambda actor: attempt(actor, saves=3, world=world.trials[0]))
    alone.run(_ALL)
    assert alone.outcome == "done"
    assert [pin.home for pin in world.trials[0].chain[-1].pins] == [world.url]
    return alone.operations


@settings(
    max_examples=1200 if SCALE > 1 else 80, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    st.integers(0, 2),
    st.permutations("ABTUV"),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([*"ABTUV", "land", *Suffers.__members__])), max_size=16),
)
def test_any_schedule(base_saves: int, cast: list[str], events: list[tuple[int, str]]) -> None:
    _play(_worlds(base_saves), "".join(cast), events)


def test_every_pair_of_preemptions() -> None:
    """The trial stops anywhere, the base goes on and stops anywhere, the trial goes on, then the base."""
    total = _operations_of_a_trial()
    for first in range(total + 1):
        for second in range(first % 11, total + 12, 1 if SCALE > 1 else 11):
            _play(_worlds(base_saves=2), "TA", [(first, "A"), (second, "T")])


@pytest.mark.parametrize("suffers", Suffers)
def test_every_operation_suffers_once(suffers: Suffers) -> None:
    """The trial is hurt at one operation, the base goes on, another attempt takes over, and what was late lands."""
    for number in range(_operations_of_a_trial()):
        for late in (0, 9):
            events = [(number, suffers.name), (6, "A"), (25, "U"), (late, "land"), (20, "T")]
            _play(_worlds(base_saves=2), "TAU", events)
