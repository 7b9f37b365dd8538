"""Answers that no protocol foresees: nothing is raised, and what is made of them can be computed with and recorded."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import pytest
from hearing import one_poll
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.clock import SystemClock
from holdfast.notice import gcp
from holdfast.notice.aws import AwsWatcher
from holdfast.notice.azure import AzureWatcher
from holdfast.notice.base import NoticeKind, Watcher
from holdfast.notice.times import parse_time_unix_s
from holdfast.testing.loopback import Answer
from holdfast.testing.metadata import Ask, metadata_server

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
        st.sampled_from(["terminate", "Preempt", "Started", "9999-12-31T23:59:59Z", "Mon, 19 Sep 2016 18:29:47 GMT"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["action", "time", "noticeTime", "NotBefore", "State", "EventId", "Code", "Events", "EventType", "Resources",
                 "EventStatus", "DocumentIncarnation", "name", "ResourceType"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=50).map(str.encode),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.lists(VALUES, max_size=3).map(lambda events: json.dumps({"DocumentIncarnation": 1, "Events": events}).encode()),
    st.sampled_from(
        [b"[" * 5000, b"TRUE\n", b"", b"true", b"PENDING_STOP", b"Terminated", b"1e999", b"NaN", b'"\\ud800"']
    ),
)
ANSWERS = st.builds(
    Answer,
    st.sampled_from([200, 200, 200, 200, 404, 401, 500, 302, 204]),
    st.sampled_from([(), (("ETag", "x"),), (("Content-Encoding", "gzip"),), (("Location", "http://127.0.0.1:1/"),)]),
    BODIES,
)


class Scripted:
    """A metadata service that answers anything with whatever it was told to."""

    name = "scripted"
    verbs: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.next = Answer(404)
        self.with_token = True

    def environment(self, endpoint: str) -> dict[str, str]:
        return {}

    def apply(self, step: object, at_unix_s: float) -> None:
        return None

    def answer(self, ask: Ask, now_unix_s: float, waited_s: float) -> Answer:
        return Answer(200, (), b"token") if ask.method == "PUT" and self.with_token else self.next


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Scripted, str]]:
    cloud = Scripted()
    with metadata_server(cloud) as server:
        yield cloud, server.endpoint


def watchers(endpoint: str) -> list[Watcher]:
    azure = AzureWatcher(endpoint, timeout_s=60.0)
    return [AwsWatcher(endpoint, timeout_s=60.0), azure, *gcp.watchers(endpoint, timeout_s=60.0)]


@settings(max_examples=150 if os.environ.get("HOLDFAST_TEST_SCALE") == "long" else 60)
@given(answer=ANSWERS, with_token=st.booleans())
def test_whatever_is_answered_nothing_is_raised(
    scripted: tuple[Scripted, str], answer: Answer, with_token: bool
) -> None:
    cloud, endpoint = scripted
    cloud.next, cloud.with_token = answer, with_token

    async def poll() -> None:
        for told, troubles in await asyncio.gather(*(one_poll(w, SystemClock()) for w in watchers(endpoint))):
            for notice in told:
                assert notice.deadline_unix_s is None or math.isfinite(notice.deadline_unix_s)
                assert notice.kind not in (NoticeKind.PREEMPTION, NoticeKind.TERMINATION) or notice.deadline_unix_s
                msgspec.json.encode(notice.evidence)
            assert all(isinstance(what, str) and len(what) < 400 for _, what in troubles)

    asyncio.run(poll())


def test_an_answer_without_end_is_cut_off(scripted: tuple[Scripted, str]) -> None:
    cloud, endpoint = scripted
    cloud.next, cloud.with_token = Answer(200, (), b"x" * 10_000_000), True
    for watcher in watchers(endpoint):
        told, troubles = asyncio.run(one_poll(watcher, SystemClock(), until_trouble=True))
        assert told == []
        assert "more than 262144 bytes" in troubles[0][1]


def test_a_strange_entry_hides_no_other() -> None:
    event = {
        "EventId": "e",
        "EventType": "Preempt",
        "Resources": ["trainer_0"],
        "NotBefore": "",
        "EventStatus": "Started",
    }
    azure = {"DocumentIncarnation": 1, "Events": [None, 7, {}, {"Resources": [None]}, event]}
    aws = [None, {"State": "active", "Code": "system-reboot", "EventId": "e", "NotBefore": "21 Jan 2019 09:00:43 GMT"}]
    assert {notice.id for notice in _said(AzureWatcher, azure)} >= {"e"}
    assert {notice.id for notice in _said(AwsWatcher, aws)} >= {"e"}


def _said(watcher: Any, body: object) -> list[Any]:
    cloud = Scripted()
    cloud.next = Answer(200, (), json.dumps(body).encode())
    with metadata_server(cloud) as server:
        return asyncio.run(one_poll(watcher(server.endpoint, timeout_s=60.0), SystemClock()))[0]


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:1", "http://[::", "ftp://x", "no endpoint", "http://\u2603.invalid"]
)
def test_an_endpoint_that_is_none_is_trouble_and_no_error(endpoint: str) -> None:
    told, troubles = asyncio.run(one_poll(AwsWatcher(endpoint, timeout_s=60.0), SystemClock(), until_trouble=True))
    assert told == []
    assert "no token" in troubles[0][1]


@pytest.mark.parametrize(
    ("text", "unix_s"),
    [
        ("2017-09-18T08:22:00Z", 1505722920.0),
        ("2017-09-18T10:22:00+02:00", 1505722920.0),
        ("2017-09-18 08:22:00", 1505722920.0),
        ("Mon, 18 Sep 2017 08:22:00 GMT", 1505722920.0),
        ("18 Sep 2017 08:22:00 GMT", 1505722920.0),
        ("1505722920.5", 1505722920.5),
        ("", None),
        ("soon", None),
        ("30", None),
        ("99999-01-01", None),
        ("1e300", None),
        (None, None),
        (17, None),
    ],
)
def test_points_in_time_as_providers_write_them(text: object, unix_s: float | None) -> None:
    assert parse_time_unix_s(text) == unix_s


@given(st.text())
def test_no_text_breaks_the_reading_of_time(text: str) -> None:
    moment = parse_time_unix_s(text)
    assert moment is None or math.isfinite(moment)
