"""The state machine: what the consumer knows is always what the sources say, whatever order they say it in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.notice.base import Notice, NoticeKind
from holdfast.notice.merging import EXPIRED_S, SLIDE_S, Heard, Merging, Recovered, Tick, Told, Troubled

NOW_S = 1_000_000.0
ENDS = (NoticeKind.PREEMPTION, NoticeKind.TERMINATION, NoticeKind.MAINTENANCE)


def word(source: str, left_s: float | None, *, id: str = "event", kind: NoticeKind = NoticeKind.PREEMPTION) -> Notice:
    deadline = None if left_s is None else NOW_S + left_s
    return Notice(kind=kind, deadline_unix_s=deadline, source=source, id=id, heard_unix_s=NOW_S)


def off(source: str, id: str = "event") -> Notice:
    return word(source, None, id=id, kind=NoticeKind.WITHDRAWN)


def names(told: Told) -> list[str]:
    return [event.name for event in told.events]


def test_two_sources_of_one_event_are_one_notice_with_the_earliest_deadline() -> None:
    merging = Merging()
    (first,) = merging.take(Heard(word("aws:spot", 120)), NOW_S).notices
    # The node's shutdown signals a pod that has 30 s; the scaling group reacts a minute later than that.
    (second,) = merging.take(Heard(word("kubernetes:SIGTERM", 30, kind=NoticeKind.TERMINATION)), NOW_S).notices
    third = merging.take(Heard(word("aws:autoscaling", 90, kind=NoticeKind.TERMINATION)), NOW_S)
    assert (second.id, second.kind) == (first.id, NoticeKind.PREEMPTION)
    assert second.deadline_unix_s == NOW_S + 30
    assert third.notices == ()
    assert names(third) == ["notice.heard"]
    assert third.events[0].fields["duplicate"]
    # The one that named the earliest deadline takes it back: the others still stand.
    (fourth,) = merging.take(Heard(off("kubernetes:SIGTERM")), NOW_S).notices
    assert (fourth.kind, fourth.deadline_unix_s) == (NoticeKind.PREEMPTION, NOW_S + 90)
    assert merging.take(Heard(off("aws:spot")), NOW_S).notices[0].kind == NoticeKind.TERMINATION
    (last,) = merging.take(Heard(off("aws:autoscaling")), NOW_S).notices
    assert (last.kind, last.id, last.evidence["was"]) == (NoticeKind.WITHDRAWN, first.id, "termination")
    assert merging.open() == []


def test_ends_that_are_far_apart_and_events_of_one_source_are_not_merged() -> None:
    merging = Merging()
    told = [
        *merging.take(Heard(word("aws:maintenance", 86400, kind=NoticeKind.MAINTENANCE)), NOW_S).notices,
        *merging.take(Heard(word("aws:spot", 120)), NOW_S).notices,
        *merging.take(Heard(word("aws:spot", 130, id="another")), NOW_S).notices,
        *merging.take(Heard(word("aws:rebalance", None, kind=NoticeKind.REBALANCE)), NOW_S).notices,
    ]
    assert len({notice.id for notice in told}) == 4
    assert [notice.left_s(NOW_S) for notice in merging.open()] == [120, 130, 86400, None]


def test_a_notice_that_nothing_came_of_expires_and_stays_expired_until_it_moves() -> None:
    merging = Merging()
    merging.take(Heard(word("gcp:preempted", 30)), NOW_S)
    assert merging.take(Tick(), NOW_S + 30 + EXPIRED_S) == Told()
    late_s = NOW_S + 31 + EXPIRED_S
    (over,) = merging.take(Tick(), late_s).notices
    assert (over.kind, over.evidence["reason"]) == (NoticeKind.WITHDRAWN, "expired")
    assert merging.take(Heard(word("gcp:preempted", 30)), late_s) == Told()
    (again,) = merging.take(Heard(word("gcp:preempted", 500)), late_s).notices
    assert again.kind == NoticeKind.PREEMPTION
    assert again.id != over.id


def test_a_deadline_that_is_long_past_when_it_is_first_heard_is_recorded_and_not_told() -> None:
    merging = Merging()
    told = merging.take(Heard(word("file:/run/going", -EXPIRED_S - 1)), NOW_S)
    assert told.notices == ()
    assert names(told) == ["notice.trouble"]
    assert merging.take(Heard(word("file:/run/going", -EXPIRED_S - 1)), NOW_S) == Told()
    assert len(merging.take(Heard(word("aws:spot", -1)), NOW_S).notices) == 1


@pytest.mark.parametrize("deadline", [None, math.nan, math.inf, -math.inf])
def test_an_end_without_a_credible_time_is_assumed_to_be_near(deadline: float | None) -> None:
    notice = Notice(
        kind=NoticeKind.PREEMPTION, deadline_unix_s=deadline, source="x", id="y", heard_unix_s=NOW_S, evidence={}
    )
    (told,) = Merging().take(Heard(notice), NOW_S).notices
    assert told.left_s(NOW_S) == 30.0
    assert told.assumed


def test_days_of_trouble_are_a_few_records_and_recovery_is_one() -> None:
    merging = Merging()
    recorded = [e for _ in range(20_000) for e in merging.take(Troubled("aws:spot", "status 500"), NOW_S).events]
    assert [event.fields["times"] for event in recorded] == [2**n for n in range(15)]
    (well,) = merging.take(Recovered("aws:spot"), NOW_S).events
    assert well.fields["times"] == 20_000
    assert merging.take(Recovered("aws:spot"), NOW_S) == Told()


@dataclass
class Consumer:
    """What somebody who hears only what is told believes."""

    open: dict[str, Notice]

    def hears(self, notice: Notice) -> None:
        if notice.kind == NoticeKind.WITHDRAWN:
            assert self.open.pop(notice.id, None) is not None, "withdrawn, but never told"
        else:
            assert (notice.kind in (NoticeKind.PREEMPTION, NoticeKind.TERMINATION)) <= (
                notice.deadline_unix_s is not None
            )
            assert self.open.get(notice.id) != notice, "told twice"
            self.open[notice.id] = notice


SOURCES = st.sampled_from(["aws:spot", "aws:autoscaling", "signal:SIGTERM", "file:/run/going"])
IDS = st.sampled_from(["a", "b"])
SAYINGS = st.one_of(
    st.tuples(
        st.just("heard"), SOURCES, IDS, st.sampled_from((*ENDS, NoticeKind.REBALANCE)),
        st.one_of(st.none(), st.floats(-1000, 2000), st.sampled_from([math.nan, math.inf])),
    ),
    st.tuples(st.just("off"), SOURCES, IDS),
    st.tuples(st.just("wait"), st.floats(0, 400)),
    st.tuples(st.just("trouble"), SOURCES),
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(SAYINGS, max_size=40))
def test_the_consumer_always_knows_the_earliest_end_that_any_source_names(sayings: list[tuple[object, ...]]) -> None:
    merging, consumer = Merging(), Consumer({})
    says: dict[tuple[str, str], float | None] = {}
    """What each source says at the moment: (source, id) → deadline, None for advice."""
    now_s = NOW_S
    for saying in sayings:
        match saying:
            case ("heard", str(source), str(id), NoticeKind() as kind, (float() | None) as left_s):
                deadline = None if left_s is None else now_s + left_s
                notice = Notice(kind=kind, deadline_unix_s=deadline, source=source, id=id, heard_unix_s=now_s)
                told = merging.take(Heard(notice), now_s)
                if kind == NoticeKind.REBALANCE:
                    says[source, id] = None
                elif deadline is not None and math.isfinite(deadline):
                    says[source, id] = deadline
                else:
                    says[source, id] = None if kind == NoticeKind.MAINTENANCE else now_s + 30.0
            case ("off", str(source), str(id)):
                told = merging.take(Heard(off(source, id)), now_s)
                says.pop((source, id), None)
            case ("wait", float(seconds)):
                now_s += seconds
                told = merging.take(Tick(), now_s)
            case _:
                told = merging.take(Troubled("x", "y"), now_s)
        for notice in told.notices:
            consumer.hears(notice)

        assert {n.id: n for n in merging.open()} == consumer.open
        ahead = [deadline for deadline in says.values() if deadline is not None and deadline >= now_s - EXPIRED_S]
        believed = [n.deadline_unix_s for n in consumer.open.values() if n.deadline_unix_s is not None]
        if ahead:
            assert believed, "an end that a source names is not known"
            assert min(believed) < min(ahead) + SLIDE_S
        for deadline in believed:
            assert any(d is not None and abs(d - deadline) < SLIDE_S for d in says.values()), "no source says so"
        gathered = [(s.source, s.id) for id in consumer.open for s in merging.sightings(id)]
        assert len(gathered) == len(set(gathered)), "one sighting in two incidents"
