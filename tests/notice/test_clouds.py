"""Each cloud's watcher against a server that behaves like that cloud, in virtual time: hours of watching, faults included."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from hearing import START_UNIX_S, VirtualClock, hear, one_poll

from holdfast.core.clock import SystemClock
from holdfast.core.events import CollectingSink
from holdfast.notice import gcp
from holdfast.notice.aws import AwsWatcher
from holdfast.notice.azure import AzureWatcher
from holdfast.notice.base import Lookout, Notice, NoticeKind, Watcher
from holdfast.testing.loopback import Answer
from holdfast.testing.metadata import Fault, MetadataServer, Step, metadata_server
from holdfast.testing.metadata.aws import AwsCloud
from holdfast.testing.metadata.azure import AzureCloud

PATIENT_S = 300.0
"""Where everything is answered no request times out, however busy this machine is."""
BRIEF_S = 0.25
"""Where a server stalls, every request that it swallows costs this much real time."""
PARTIES = {"aws": 2, "gcp": 4, "azure": 2}
"""Watchers, and the stream's ticker."""
NOTICES = 50 if os.environ.get("HOLDFAST_TEST_SCALE") == "long" else 20
POLL_S = {"aws": 5.0, "gcp": 1.0, "azure": 1.0}


def watchers_of(cloud: str, endpoint: str, timeout_s: float = PATIENT_S, **options: Any) -> list[Watcher]:
    match cloud:
        case "aws":
            return [AwsWatcher(endpoint, timeout_s=timeout_s, **options)]
        case "gcp":
            return [*gcp.watchers(endpoint, timeout_s=timeout_s, **options)]
        case _:
            return [AzureWatcher(endpoint, timeout_s=timeout_s, **options)]


@contextmanager
def rehearsal(cloud: Any, timeline: Any = ()) -> Iterator[tuple[MetadataServer, VirtualClock, CollectingSink]]:
    name = cloud if isinstance(cloud, str) else cloud.name
    clock = VirtualClock(PARTIES[name])
    with ExitStack() as stack:
        server = stack.enter_context(metadata_server(cloud, timeline=timeline, clock=clock, wait_step_s=1.0))
        stack.callback(clock.stop)
        yield server, clock, CollectingSink()


def run(cloud: Any, timeline: Any, count: int, **options: Any) -> tuple[list[Notice], MetadataServer, CollectingSink]:
    """The first `count` notices."""
    with rehearsal(cloud, timeline) as (server, clock, sink):
        watchers = watchers_of(server.cloud.name, server.endpoint, **options)
        told = asyncio.run(hear(watchers, clock, sink, lambda so_far: len(so_far) >= count))
        return told, server, sink


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("faulty", [pytest.param(False, marks=pytest.mark.long), True], ids=["calm", "faulty"])
def test_of_many_notices_at_random_moments_none_is_missed(cloud: str, faulty: bool) -> None:
    rng = random.Random(f"{cloud} {faulty}")
    steps: list[Step] = []
    announced: list[float] = []
    at_s = 0.0
    for number in range(NOTICES):
        at_s += rng.uniform(10.0, 20.0)
        if faulty:
            fault = rng.choice([Fault.ERROR, Fault.GARBAGE, Fault.DENY, Fault.RESET])
            # It begins before the notice and ends before it is withdrawn.
            steps.append(Step(at_s=at_s - rng.uniform(0, 9.0), do=fault, for_s=rng.uniform(1.0, 15.0)))
        announced.append(at_s)
        steps.append(Step(at_s=at_s, do="preempt", lead_s=120.0, id=f"event-{number}"))
        at_s += rng.uniform(25.0, 30.0) if faulty else rng.uniform(6.0, 20.0)
        steps.append(Step(at_s=at_s, do="withdraw"))
        at_s += 12.0
    told, _, sink = run(cloud, steps, 2 * NOTICES)

    assert [notice.kind for notice in told] == [NoticeKind.PREEMPTION, NoticeKind.WITHDRAWN] * NOTICES
    latest_s = POLL_S[cloud] + (16.0 if faulty else 0.0) + 1.0
    for at_s, notice in zip(announced, told[::2], strict=True):
        heard_s = notice.heard_unix_s - START_UNIX_S
        assert at_s <= heard_s <= at_s + latest_s
        assert notice.deadline_unix_s is not None
        if cloud == "gcp":
            assert notice.assumed
            assert notice.deadline_unix_s == notice.heard_unix_s + 30.0
        else:
            assert not notice.assumed
            assert START_UNIX_S + at_s + 119.0 <= notice.deadline_unix_s <= START_UNIX_S + at_s + 120.0
    assert len(sink.named("notice.heard")) == len(sink.named("notice.withdrawn")) == NOTICES
    assert bool(sink.named("notice.trouble")) == faulty


@pytest.mark.parametrize("cloud", ["aws", "azure"])
def test_a_deadline_that_slides_is_told_again_and_a_whole_second_is_not(cloud: str) -> None:
    timeline = [
        {"at": 10, "do": "preempt", "lead": 120, "id": "event"},
        {"at": 20, "do": "slide", "lead": 111},  # one second later than said
        {"at": 30, "do": "slide", "lead": 40},
        {"at": 45, "do": "slide", "lead": 90},
        {"at": 60, "do": "withdraw"},
    ]
    told, _, sink = run(cloud, timeline, 4)
    assert [n.kind for n in told] == [NoticeKind.PREEMPTION] * 3 + [NoticeKind.WITHDRAWN]
    assert [round((n.deadline_unix_s or 0) - START_UNIX_S) for n in told[:3]] == [130, 70, 135]
    assert len({n.id for n in told}) == 1
    assert len(sink.named("notice.moved")) == 2


def test_aws_tells_advice_scaling_and_maintenance_and_keeps_events_apart() -> None:
    timeline = [
        {"at": 7, "do": "rebalance"},
        {"at": 17, "do": "maintain", "lead": "2 d", "id": "disk"},
        {"at": 27, "do": "maintain", "lead": "3 d", "id": "rack"},
        {"at": 37, "do": "stop"},
        {"at": 47, "do": "preempt"},
    ]
    told, _, sink = run("aws", timeline, 5)
    assert [(n.source, n.kind) for n in told] == [
        ("aws:rebalance", NoticeKind.REBALANCE),
        ("aws:maintenance", NoticeKind.MAINTENANCE),
        ("aws:maintenance", NoticeKind.MAINTENANCE),
        ("aws:autoscaling", NoticeKind.TERMINATION),
        # The spot notice and the scaling group's are one end: the earliest deadline, the weightier word.
        ("aws:autoscaling", NoticeKind.PREEMPTION),
    ]
    assert told[0].deadline_unix_s is None
    assert [round((n.deadline_unix_s or 0) - START_UNIX_S) for n in told[1:3]] == [17 + 2 * 86400, 27 + 3 * 86400]
    assert told[3].id == told[4].id
    assert told[3].deadline_unix_s == told[4].deadline_unix_s
    assert told[4].evidence["sources"] == ["aws:autoscaling", "aws:spot"]
    assert [event.fields["duplicate"] for event in sink.named("notice.heard")] == [False] * 4 + [True]


def test_one_answer_that_lacks_an_event_does_not_withdraw_it() -> None:
    class Flapping(AwsCloud):
        asked = 0

        def _value(self, path: str) -> str | None:
            self.asked += path == "spot/instance-action"
            return None if self.asked % 2 and path == "spot/instance-action" else super()._value(path)

    told, _, sink = run(Flapping(), [(10, "preempt"), (100, "withdraw")], 2)
    assert [n.kind for n in told] == [NoticeKind.PREEMPTION, NoticeKind.WITHDRAWN]
    assert told[1].heard_unix_s - START_UNIX_S >= 100
    assert not sink.named("notice.moved")


def test_aws_tokens_run_out_are_renewed_ahead_and_when_they_are_refused() -> None:
    timeline = [
        *({"at": at_s, "do": "revoke"} for at_s in (222, 333.3, 604)),
        {"at": 605, "do": "preempt"},
    ]
    told, server, sink = run("aws", timeline, 1, token_ttl_s=60)
    assert told[0].heard_unix_s - START_UNIX_S <= 611
    issued = sum(ask.method == "PUT" for ask, _ in server.asked)
    refused = sum(status == 401 for _, status in server.asked)
    # Renewed after 48 of 60 seconds; only what was revoked is ever refused, and then asked for once, not once per request.
    assert 12 <= issued <= 20
    assert 0 < refused <= 3 * 4
    assert not sink.named("notice.trouble")
    assert all(", " not in ask.headers.get("x-aws-ec2-metadata-token", "") for ask, _ in server.asked)


def test_aws_trusts_the_date_of_the_answer_more_than_this_machines_clock() -> None:
    with rehearsal("aws", [(3, "preempt")]) as (server, clock, sink):

        class Ahead:
            """This machine's clock, ten minutes ahead of the provider's."""

            monotonic_s = clock.monotonic_s
            pause = staticmethod(clock.pause)

            def unix_s(self) -> float:
                return clock.unix_s() + 600.0

        watchers = watchers_of("aws", server.endpoint)
        (notice,) = asyncio.run(hear(watchers, Ahead(), sink, lambda told: len(told) == 1))  # type: ignore[arg-type]
    left_s = notice.left_s(notice.heard_unix_s)
    assert left_s is not None
    assert 115 <= left_s <= 120


@pytest.mark.parametrize(
    ("body", "kind", "left_s"),
    [
        ('{"action": "stop", "time": "soon"}', "preemption", 115.0),
        ('{"action": "hibernate", "time": "2100-01-01T00:00:00Z"}', "preemption", 0.0),
        ('{"action": "terminate"}', "preemption", 115.0),
    ],
)
def test_an_aws_interruption_without_a_usable_time_is_still_an_interruption(
    body: str, kind: str, left_s: float
) -> None:
    with rehearsal("aws") as (server, clock, sink):
        server.cloud._value = {"spot/instance-action": body}.get  # type: ignore[attr-defined]
        (notice,) = asyncio.run(hear(watchers_of("aws", server.endpoint), clock, sink, lambda told: len(told) == 1))
    assert notice.kind == kind
    assert notice.assumed
    assert notice.left_s(notice.heard_unix_s) == left_s


def test_gcp_hears_maintenance_migration_and_a_stop_and_when_they_are_off() -> None:
    timeline = [(10, "migrate"), (20, "maintain"), (40, "withdraw"), (60, "stop")]
    told, _, _ = run("gcp", timeline, 4)
    assert [(n.source, n.kind, n.left_s(START_UNIX_S + 20)) for n in told[:3]] == [
        ("gcp:maintenance-event", NoticeKind.MAINTENANCE, None),
        ("gcp:maintenance-event", NoticeKind.MAINTENANCE, 60.0),
        ("gcp:maintenance-event", NoticeKind.WITHDRAWN, None),
    ]
    assert (told[3].source, told[3].kind) == ("gcp:stop-state", NoticeKind.TERMINATION)
    assert told[3].left_s(told[3].heard_unix_s) == 30.0


def test_gcp_waits_at_the_server_instead_of_asking_all_the_time() -> None:
    told, server, _ = run("gcp", [(1000, "preempt")], 1, preemption_lead_s=120.0)
    assert told[0].left_s(told[0].heard_unix_s) == 120.0
    assert told[0].heard_unix_s - START_UNIX_S <= 1002
    polls = [ask for ask, _ in server.asked if ask.path.endswith("/preempted")]
    assert len(polls) <= 1 + 1000 / 5 + 2
    assert all(set(ask.query) == {"wait_for_change", "last_etag", "timeout_sec"} for ask in polls[1:])


def test_azure_hears_its_own_events_only_and_a_start_brings_the_end_forward() -> None:
    timeline = [
        {"at": 5, "do": "others", "id": "theirs"},
        {"at": 10, "do": "freeze", "id": "pause"},
        {"at": 20, "do": "preempt", "id": "ours", "lead": 60},
        {"at": 30, "do": "start", "id": "ours"},
    ]
    told, _, sink = run("azure", timeline, 4)
    assert [(n.kind, n.left_s(START_UNIX_S + 20)) for n in told[:2]] == [
        (NoticeKind.MAINTENANCE, None),
        (NoticeKind.PREEMPTION, 60.0),
    ]
    # It has started: the end is now. Then it is not listed any more, and the machine still runs.
    assert told[2].kind == NoticeKind.PREEMPTION
    assert 30 <= (told[2].deadline_unix_s or 0) - START_UNIX_S <= 32
    assert told[3].kind == NoticeKind.WITHDRAWN
    assert "theirs" not in {event.fields["id"] for event in sink.named("notice.heard")}


def test_azure_takes_every_event_as_its_own_until_it_knows_its_name() -> None:
    class Nameless(AzureCloud):
        def answer(self, ask: Any, now_unix_s: float, waited_s: float) -> Any:
            if ask.path.endswith("/compute") and now_unix_s < START_UNIX_S + 30:
                return Answer(500, (), b"")
            return super().answer(ask, now_unix_s, waited_s)

    timeline = [{"at": 5, "do": "others", "lead": 300}, {"at": 6, "do": "preempt", "lead": 301}]
    told, _, sink = run(Nameless(), timeline, 3)
    assert [n.kind for n in told] == [NoticeKind.PREEMPTION, NoticeKind.PREEMPTION, NoticeKind.WITHDRAWN]
    assert told[2].id == told[0].id
    assert told[0].evidence["own_name"] is None
    assert {event.fields["source"] for event in sink.named("notice.trouble")} == {"azure:instance"}


@pytest.mark.parametrize("stuck_forever", [False, True])
def test_azures_slow_first_call_is_waited_for_but_not_relied_upon(stuck_forever: bool) -> None:
    """The service wakes up only for a request that has waited long enough; or that one request hangs, and others are answered."""

    class Slow(AzureCloud):
        asked = 0

        def answer(self, ask: Any, now_unix_s: float, waited_s: float) -> Any:
            if stuck_forever and ask.path.endswith("/scheduledevents"):
                self.asked += waited_s == 0
                self._awake = True
                if self.asked <= 2:
                    return None
            return super().answer(ask, now_unix_s, waited_s)

    # The patient request and the brief one beside it are parties of their own; what was given up sleeps on at the server.
    clock = VirtualClock(2)
    sink = CollectingSink()
    timeline = [{"at": 1, "do": "preempt", "lead": "365 d"}]
    with metadata_server(Slow(first_call_s=100.0), timeline=timeline, clock=clock, wait_step_s=5.0) as server:
        watcher = AzureWatcher(server.endpoint, timeout_s=BRIEF_S, first_call_s=PATIENT_S)
        try:
            (notice,) = asyncio.run(hear([watcher], clock, sink, lambda told: len(told) == 1))
        finally:
            clock.stop()
    assert notice.kind == NoticeKind.PREEMPTION


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("fault", [Fault.STALL, Fault.DRIP])
def test_a_server_that_stalls_is_left_and_heard_again(cloud: str, fault: Fault) -> None:
    """The notice comes while nothing is answered, and is told when the server speaks again."""
    with rehearsal(cloud) as (server, clock, sink):
        server.misbehave(fault)
        server.do("preempt", id="event", lead="1 h")

        def enough(told: list[Notice]) -> bool:
            return bool(told)

        options = {"timeout_s": BRIEF_S} | ({"first_call_s": BRIEF_S} if cloud == "azure" else {})
        watchers = watchers_of(cloud, server.endpoint, **options)

        async def scenario() -> list[Notice]:
            hearing = asyncio.ensure_future(hear(watchers, clock, sink, enough))
            async with asyncio.timeout(PATIENT_S):
                while not sink.named("notice.trouble"):
                    await asyncio.sleep(0.01)
            server.recover()
            return await hearing

        (notice,) = asyncio.run(scenario())
    assert notice.kind == NoticeKind.PREEMPTION
    assert any("no answer within" in event.fields["what"] for event in sink.named("notice.trouble"))


@pytest.mark.parametrize("alone", [True, False])
def test_azure_is_told_to_begin_only_when_this_machine_is_the_only_one_concerned(alone: bool) -> None:
    troubles: list[str] = []
    lookout = Lookout(SystemClock(), asyncio.sleep, lambda source, what: troubles.append(what), lambda source: None)

    async def scenario(server: MetadataServer) -> list[bool]:
        watcher = AzureWatcher(server.endpoint, timeout_s=5.0)
        (notice,), _ = await one_poll(watcher, SystemClock())
        return [await watcher.acknowledge(notice, lookout) for _ in range(2)]

    with metadata_server("azure") as server:
        server.do("preempt" if alone else "shared", id="event")
        answers = asyncio.run(scenario(server))
        cloud = server.cloud
    assert isinstance(cloud, AzureCloud)
    # The second word would be for an event that has begun.
    assert answers == [alone, False]
    assert cloud.acknowledged == (["event"] if alone else [])
    assert ("other machines" in troubles[0]) == (not alone)
