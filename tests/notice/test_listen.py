"""The listener as agent and trainer use it: its own thread, signals, files, flaws of everybody around it, and a prompt end."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.core.clock import SystemClock
from holdfast.core.errors import UsageError
from holdfast.core.events import CollectingSink, Event
from holdfast.notice.aws import AwsWatcher
from holdfast.notice.base import Lookout, Notice, NoticeKind
from holdfast.notice.file import FileWatcher
from holdfast.notice.listen import Listener, listen
from holdfast.notice.slurm import SlurmTimeLimit, slurm_signals
from holdfast.testing.metadata import metadata_server

PATIENCE_S = 300.0


class Consumer:
    """Hears notices; `next` waits for one."""

    def __init__(self) -> None:
        self.heard: queue.Queue[Notice] = queue.Queue()
        self.sink = CollectingSink()

    def next(self) -> Notice:
        return self.heard.get(timeout=PATIENCE_S)

    @contextmanager
    def listening(self, spec: str, **options: Any) -> Iterator[Listener]:
        defaults: dict[str, Any] = {
            "environ": {}, "clock": SystemClock(), "sink": self.sink, "on_notice": self.heard.put
        }  # fmt: skip
        listener = listen(spec, **(defaults | options))
        try:
            yield listener
        finally:
            listener.close()
            assert not listener._thread.is_alive()


def notice(source: str = "x", *, left_s: float = 100.0) -> Notice:
    return Notice(
        kind=NoticeKind.PREEMPTION, deadline_unix_s=SystemClock().unix_s() + left_s, source=source, id="y",
        heard_unix_s=SystemClock().unix_s(),
    )  # fmt: skip


class Scripted:
    """A watcher that does what it is told at each start."""

    name = "scripted"

    def __init__(self, *runs: Callable[[], AsyncIterator[Any]]) -> None:
        self.runs = list(runs)

    def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        return self.runs.pop(0)()


def test_a_signal_becomes_a_notice_also_when_it_comes_from_a_handler_and_twice() -> None:
    consumer = Consumer()
    with consumer.listening("none", grace_s=25.0) as listener:
        before = signal.signal(signal.SIGUSR1, lambda number, frame: listener.received(number))
        try:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        listener.received(signal.SIGWINCH)
        told = consumer.next()
        assert (told.kind, told.source, told.assumed) == (NoticeKind.TERMINATION, "signal:SIGUSR1", True)
        assert told.left_s(told.heard_unix_s) == pytest.approx(25.0)
        assert listener.open_notices() == (told,)
    assert consumer.heard.empty()


def test_a_signal_before_the_thread_is_up_is_not_lost() -> None:
    consumer = Consumer()
    for _ in range(20):
        with consumer.listening("none") as listener:
            listener.received(signal.SIGTERM)
            assert consumer.next().evidence["signal"] == "SIGTERM"


def test_signals_and_files_are_heard_while_auto_still_looks_around(tmp_path: Path, monkeypatch: Any) -> None:
    looking = threading.Event()

    async def detect(environ: Any) -> tuple[str, ...]:
        import asyncio

        looking.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("holdfast.notice.detect.detect", detect)
    consumer = Consumer()
    with consumer.listening(f"auto,file:{tmp_path / 'going'}") as listener:
        assert looking.wait(PATIENCE_S)
        assert listener.listening_to == ()
        (tmp_path / "going").touch()
        assert consumer.next().source == f"file:{tmp_path / 'going'}"


def test_auto_hears_the_server_that_a_variable_names_and_a_kubernetes_grace() -> None:
    consumer = Consumer()
    with metadata_server("azure") as server:
        environ = {**server.environment, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        server.do("preempt", id="event", lead=60)
        with consumer.listening("auto", environ=environ) as listener:
            assert listener.wait_until_listening(PATIENCE_S)
            assert listener.listening_to == ("kubernetes", "azure:scheduled-events")
            told = consumer.next()
            assert told.kind == NoticeKind.PREEMPTION
            listener.received(signal.SIGTERM)
            # The same end: the pod's 30 s are earlier than the machine's 60.
            sooner = consumer.next()
            assert (sooner.id, sooner.source) == (told.id, "kubernetes:SIGTERM")
            # Ready to go: Azure need not wait any longer.
            assert listener.acknowledge(sooner)
            assert not listener.acknowledge(notice())
            assert server.cloud.acknowledged == ["event"]  # type: ignore[attr-defined]
        assert not listener.acknowledge(sooner)
    assert consumer.sink.named("notice.acknowledged")


def test_a_watcher_that_fails_is_recorded_and_started_again_and_the_others_are_heard() -> None:
    async def fails() -> AsyncIterator[Notice]:
        raise RuntimeError("a flaw")
        yield  # type: ignore[unreachable]

    async def fails_later() -> AsyncIterator[Notice]:
        yield notice("first", left_s=1000)
        raise KeyError("another")

    async def nonsense() -> AsyncIterator[Any]:
        yield "no notice"

    async def half_nonsense() -> AsyncIterator[Any]:
        yield Notice(kind="doom", deadline_unix_s="soon", source="x", id="y", heard_unix_s=0.0)  # type: ignore[arg-type]
        yield notice("second", left_s=5000)

    async def at_once(seconds: float) -> None:
        import asyncio

        naps.append(seconds)
        await asyncio.sleep(0 if len(naps) < 20 else PATIENCE_S)

    naps: list[float] = []
    consumer = Consumer()
    watcher = Scripted(fails, fails, fails_later, fails, nonsense, half_nonsense)
    with consumer.listening("none", watchers=[watcher], sleep=at_once):
        assert [consumer.next().source for _ in range(2)] == ["first", "second"]
    troubles = [event.fields["what"] for event in consumer.sink.named("notice.trouble")]
    assert any("RuntimeError: a flaw" in what for what in troubles)
    assert any("not a notice" in what for what in troubles)
    # The pauses grow, and begin anew once something was heard.
    assert [pause for pause in naps if pause in (0.1, 0.2, 0.4)][:4] == [0.1, 0.2, 0.1, 0.2]


def test_a_consumer_and_a_sink_that_fail_cost_no_notice() -> None:
    class Broken:
        def emit(self, event: Event) -> None:
            raise OSError("disk full")

    heard: queue.Queue[str] = queue.Queue()

    def on_notice(told: Notice) -> None:
        heard.put(told.source)
        raise ValueError("a flaw of the consumer")

    with Consumer().listening("none", sink=Broken(), on_notice=on_notice) as listener:
        for source, left_s in (("one", 100.0), ("two", 1000.0), ("three", 10_000.0)):
            while not listener._stream:
                listener.wait_until_listening(PATIENCE_S)
            listener.say(notice(source, left_s=left_s))
            assert heard.get(timeout=PATIENCE_S) == source


def test_it_can_be_closed_from_its_own_callback_and_more_than_once() -> None:
    closed = threading.Event()
    listeners: list[Listener] = []

    def on_notice(told: Notice) -> None:
        listeners[0].close()
        assert not listeners[0].acknowledge(told)
        closed.set()

    with Consumer().listening("none", on_notice=on_notice) as listener:
        listeners.append(listener)
        listener.received(signal.SIGTERM)
        assert closed.wait(PATIENCE_S)
    listener.close()
    listener.received(signal.SIGTERM)
    listener.say(notice())


def test_it_closes_in_the_middle_of_a_request_that_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Consumer().listening("none", watchers=[AwsWatcher(endpoint, timeout_s=3600.0)]):
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(1)
        # `listening` has seen the thread end.


def test_a_wrong_spec_is_an_error_at_once() -> None:
    with pytest.raises(UsageError, match="file:PATH"):
        listen("azzure", clock=SystemClock(), sink=CollectingSink(), on_notice=print)


class Wall:
    """A clock that is set by hand."""

    def __init__(self, unix_s: float) -> None:
        self.now_s = unix_s

    def unix_s(self) -> float:
        return self.now_s

    monotonic_s = unix_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_file_is_a_notice_from_its_touch_to_its_removal(tmp_path: Path) -> None:
    import asyncio

    clock = Wall(1_800_000_000.0)
    path = tmp_path / "going"
    steps: list[tuple[str | None, float]] = [
        ("", 30), ("90 s", 90), ("2027-01-15T08:10:00Z", 600), ("1800000300", 300), ("in a while", 30), (None, 0),
    ]  # fmt: skip
    said: list[Notice] = []
    troubles: list[str] = []

    async def sleep(seconds: float) -> None:
        clock.sleep(1.0)
        if steps and clock.now_s % 3 == 0:
            text, _ = steps[0]
            if text is None:
                path.unlink()
            else:
                path.write_text(text + "\n")
                # Copied with an old date: it was not there a moment ago, so it is not old.
                os.utime(path, (0, 0))
            steps.pop(0)

    async def watch() -> None:
        lookout = Lookout(clock, sleep, lambda source, what: troubles.append(what), lambda source: None)
        notices: Any = FileWatcher(path, grace_s=30.0).watch(lookout)
        async for told in notices:
            said.append(told)
            if told.kind == NoticeKind.WITHDRAWN:
                await notices.aclose()

    asyncio.run(watch())
    left = [round((told.deadline_unix_s or 0) - 1_800_000_000.0) for told in said[:-1]]
    assert left[1:4] == [left[1], 600, 300]
    # Each second until the file was seen is at most one of the two in which it was written.
    assert 31 <= left[0] <= 34
    assert 94 <= left[1] <= 97
    assert [told.assumed for told in said[:4]] == [True, False, False, False]
    assert any("in a while" in what for what in troubles)


def test_slurm_tells_the_time_limit_ahead_and_no_signal_outlives_it() -> None:
    import asyncio

    clock = Wall(1_800_000_000.0)

    async def sleep(seconds: float) -> None:
        clock.sleep(seconds)

    lookout = Lookout(clock, sleep, lambda source, what: None, lambda source: None)
    environ = {"SLURM_JOB_END_TIME": "1800003600", "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "1"}

    async def first(watcher: Any) -> Notice:
        notices = watcher.watch(lookout)
        try:
            told: Notice = await anext(notices)
            return told
        finally:
            await notices.aclose()

    limit = asyncio.run(first(SlurmTimeLimit(1_800_003_600.0)))
    assert limit.heard_unix_s == 1_800_003_300.0
    assert (limit.deadline_unix_s, limit.assumed) == (1_800_003_600.0, False)
    clock.now_s = 1_800_003_590.0
    signals = slurm_signals(clock, environ, 120.0)
    signals.received(signal.SIGUSR1)
    told = asyncio.run(first(signals))
    # The limit, and KillWait after it.
    assert told.deadline_unix_s == 1_800_003_630.0
    assert told.evidence["SLURM_RESTART_COUNT"] == "1"
