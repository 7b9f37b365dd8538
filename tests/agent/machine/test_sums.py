"""What is computed: moments from grants, kept work from a progress page, since when a machine is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from controlling import Controller
from hypothesis import given
from hypothesis import strategies as st

from holdfast.agent.machine.boot import this_machine
from holdfast.agent.machine.grants import limits_of, longer
from holdfast.agent.machine.kept import KeptWork
from holdfast.agent.machine.orders import Orders
from holdfast.agent.machine.records import Records
from holdfast.core.bootstrap import ENV_LOCAL_END, ENV_MACHINE_BOOT, ENV_MACHINE_BOOT_LIMIT, ENV_MACHINE_KIND
from holdfast.core.contract import Phase, Progress
from holdfast.core.errors import UsageError
from holdfast.core.launches import GrantRecord
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock


def grant_of(lifetime_s: int, grace_s: int, part: int = 0) -> GrantRecord:
    store = MemoryStore()
    Controller(store).grant(1, part, lifetime_s, grace_s)
    orders = Orders(Records(store), 1)
    orders.look()
    assert orders.grant is not None
    return orders.grant


times = st.integers(1, 100_000)


@given(times, st.integers(0, 600), st.integers(0, 600), st.floats(0, 1e6))
def test_all_moments_lie_within_what_is_paid_for(
    lifetime_s: int, grace_s: int, command_grace_s: int, boot_s: float
) -> None:
    limits = limits_of(grant_of(lifetime_s, grace_s), boot_s, command_grace_s)
    assert boot_s + lifetime_s / 2 <= limits.stop_at_s <= boot_s + lifetime_s
    assert limits.stop_at_s <= limits.kill_at_s <= limits.end_at_s == boot_s + lifetime_s + grace_s
    has_room = limits.stop_at_s > boot_s + lifetime_s / 2
    assert not has_room or limits.kill_at_s - limits.stop_at_s >= command_grace_s


@given(st.lists(times, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_grants_hold_alike_in_whatever_order_they_are_heard(lifetimes: list[int], rng: object) -> None:
    grants = [grant_of(lifetime, 60, part) for part, lifetime in enumerate(lifetimes)]
    rng.shuffle(grants)  # type: ignore[attr-defined]
    held, before = None, None
    for grant in grants:
        held = longer(held, grant)
        limits = limits_of(held, 0.0, 30.0)
        assert before is None or limits.or_later(before) == limits
        before = limits
    assert held is not None
    assert held.lifetime_s == max(lifetimes)


steps = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=5
)  # seconds per step, steps between saves, steps until it dies


@given(steps, st.integers(0, 500))
def test_kept_work_is_the_time_of_the_steps_that_are_durable(lives: list[tuple[int, int, int]], first: int) -> None:
    """Each life restores what the one before has kept; only what is durable in the end counts, each step once."""
    kept, now_s = KeptWork(), 0.0
    durable, seconds_of = first, {}
    for attempt, (pace_s, every, length) in enumerate(lives, start=1):
        begun = durable
        kept.look(None, now_s)
        for phase, restored in ((Phase.STARTING, -1), (Phase.RESTORING, -1), (Phase.TRAINING, begun)):
            now_s += 50
            kept.look(Progress(attempt, restored, restored, -1, phase), now_s)
        committed = -1
        for step in range(begun + 1, begun + length + 1):
            for _ in range(pace_s - 1):
                now_s += 1
                kept.look(Progress(attempt, step - 1, begun, committed, Phase.TRAINING), now_s)
            now_s += 1
            seconds_of[step] = pace_s
            if (step - begun) % every == 0:
                durable = committed = step
            kept.look(Progress(attempt, step, begun, committed, Phase.TRAINING), now_s)
            assert kept.kept_step == durable
            assert kept.kept_s == sum(seconds_of[done] for done in range(first + 1, durable + 1))


def test_long_runs_need_no_more_memory() -> None:
    kept = KeptWork()
    for step in range(100_000):
        kept.look(Progress(1, step, -1, step if step else -1, Phase.TRAINING), float(step))
    assert len(kept._steps) < 1000
    assert kept.kept_s == 99_999


def test_an_altered_record_hides_no_other_and_is_no_reason_to_end() -> None:
    store = MemoryStore()
    controller = Controller(store)
    controller.grant(1, 0, 100)
    store.put("control/00000001/grant-000001", b"rubbish")
    controller.grant(1, 2, 300)
    store.put("control/00000001/command-000000", b"rubbish")
    controller.command(1, 1, "stop")
    orders = Orders(Records(store), 1)
    orders.look()
    assert orders.grant is not None
    assert (orders.grant.lifetime_s, orders.stop) == (300, ("said so",))
    assert orders.trouble is not None


def boot(
    said: dict[str, str], tmp_path: Path, uptime: str = "250.5 1.0\n", end: str | None = "shutdown -h now"
) -> object:
    (tmp_path / "uptime").write_text(uptime)
    (tmp_path / "boot").write_text("kernel\n")
    clock = ManualClock(monotonic_s=1000.0)
    return this_machine(said, end, clock, uptime=tmp_path / "uptime", boot_id=tmp_path / "boot")


def test_since_when_a_machine_is_there_and_what_may_end_it(tmp_path: Path) -> None:
    real = boot({}, tmp_path)
    assert (real.boot_s, real.boot, real.name, real.unborn_at_s) == (749.5, "kernel", "kernel", 1900.0)  # type: ignore[attr-defined]
    assert real.end_command == "shutdown -h now"  # type: ignore[attr-defined]
    local = {ENV_MACHINE_BOOT: "900", ENV_MACHINE_BOOT_LIMIT: "300", ENV_MACHINE_KIND: "local", ENV_LOCAL_END: "end it"}
    rehearsed = boot(local, tmp_path)
    assert (rehearsed.boot_s, rehearsed.boot, rehearsed.unborn_at_s) == (900.0, "kernel-900.000", 1200.0)  # type: ignore[attr-defined]
    assert rehearsed.end_command is None, "somebody's own computer is not shut down"  # type: ignore[attr-defined]
    assert boot(local, tmp_path, end="end it").end_command == "end it"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {ENV_MACHINE_BOOT: "yesterday"},
        {ENV_MACHINE_BOOT: "1001"},
        {ENV_MACHINE_BOOT: "nan"},
        {ENV_MACHINE_BOOT_LIMIT: "0"},
    ],
)
def test_a_machine_that_does_not_know_its_age_does_not_work(wrong: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        boot(wrong, tmp_path)
    with pytest.raises(UsageError):
        boot({}, tmp_path, uptime="")
