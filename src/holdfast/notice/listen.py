"""The way in: listen to this machine's providers in a thread of its own, and be called back with every notice.

    listener = listen("auto", clock=SystemClock(), sink=ledger, on_notice=told)
    signal.signal(signal.SIGTERM, lambda number, frame: listener.received(number))
    …
    listener.acknowledge(notice)   # the checkpoint is durable: where a provider waits for that word
    listener.close()

The thread is a daemon with its own event loop. Nothing here raises into the caller's thread but a mistake in `spec`, at once.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, cast

from holdfast.core.clock import Clock
from holdfast.core.events import Event, Sink
from holdfast.notice.base import Notice, Watcher
from holdfast.notice.choose import GRACE_S, SIGNALLING, Choice, make_watchers, parse_choices
from holdfast.notice.signals import SignalWatcher
from holdfast.notice.stream import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["Listener", "listen"]

_STOP_S = 5.0
_ACKNOWLEDGE_S = 10.0


def listen(
    spec: str = "auto",
    *,
    clock: Clock,
    sink: Sink,
    on_notice: Callable[[Notice], None],
    environ: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
    watchers: Sequence[Watcher] = (),
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Listener:
    """Start listening; returns at once, also where `auto` still looks around.

    `on_notice` is called in the listener's thread, for one notice after the other: it hands over and returns. `grace_s`: what a
    signal or a touched file leaves. `watchers`: listened to beside those that `spec` names. Raises UsageError for a wrong `spec`.
    """
    listener = Listener(
        parse_choices(spec), clock=clock, sink=sink, on_notice=on_notice,
        environ=dict(os.environ if environ is None else environ), grace_s=grace_s, watchers=watchers, sleep=sleep,
    )  # fmt: skip
    listener._start()
    return listener


class Listener:
    """A thread that listens. Made by `listen`.

    Thread safety: every method may be called from any thread; `received` also from inside a signal handler. Ownership: whoever
    called `listen` closes it. Failure contract: nothing raises; what fails is recorded as `notice.trouble`.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        clock: Clock,
        sink: Sink,
        on_notice: Callable[[Notice], None],
        environ: Mapping[str, str],
        grace_s: float,
        watchers: Sequence[Watcher],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._choices, self._environ, self._grace_s, self._more = choices, environ, grace_s, watchers
        self._clock, self._sink, self._on_notice, self._sleep = clock, sink, on_notice, sleep
        # Built at once, so that a signal that comes before the watching has begun is not lost. `auto` may find a scheduler.
        self._heeded: frozenset[int] = frozenset()
        self._known = self._resolve_schedulers()
        self._signals = [w for w in (*self._known, *watchers) if isinstance(w, SignalWatcher)]
        self._loop = asyncio.new_event_loop()
        # What is said before the loop runs waits in it.
        self._stream = Stream([*self._known, *watchers], clock=clock, sink=sink, sleep=sleep)
        self._listening = threading.Event()
        self._names: tuple[str, ...] = ()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="holdfast-notice", daemon=True)

    @property
    def listening_to(self) -> tuple[str, ...]:
        """Names of the watchers; empty while `auto` still looks around."""
        return self._names

    def wait_until_listening(self, timeout_s: float) -> bool:
        """Wait until it is known what is listened to."""
        return self._listening.wait(timeout_s)

    def heeds(self, number: int) -> bool:
        """Whether this signal means here that the end is near: a scheduler that was found sends it, or it was asked for by name."""
        return number in self._heeded

    def received(self, number: int) -> None:
        """The process got a signal. May be called from inside the handler."""
        for watcher in self._signals:
            watcher.received(number)

    def say(self, notice: Notice) -> None:
        """Put in a notice that came another way, like a word from the agent or from a shutdown script."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stream.say, notice)

    def open_notices(self) -> tuple[Notice, ...]:
        """Everything that stands, the most urgent first; empty: the machine is not known to go."""
        return self._stream.open_notices()

    def acknowledge(self, notice: Notice, *, timeout_s: float = _ACKNOWLEDGE_S) -> bool:
        """Tell the provider that this machine is ready for what `notice` announces; blocks for `timeout_s` at most.

        For after the checkpoint is durable: it brings the end forward. Only Azure waits for it, and it is told only where this
        machine is the only one that the event concerns. True: told. Not to be called from `on_notice`, whose thread it needs.
        """
        if threading.current_thread() is self._thread:
            return False
        word = self._stream.acknowledge(notice)
        try:
            answer: Future[bool] = asyncio.run_coroutine_threadsafe(word, self._loop)
        except RuntimeError:  # Closed meanwhile.
            word.close()
            return False
        try:
            return answer.result(timeout_s)
        except Exception:
            answer.cancel()
            return False

    def close(self) -> None:
        """Stop listening. Returns when the thread has ended, which takes milliseconds."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOP_S)

    def _start(self) -> None:
        self._thread.start()

    def _resolve_schedulers(self) -> list[Watcher]:
        """Everything that needs no looking around: all but the clouds that `auto` may find."""
        from holdfast.notice.detect import schedulers

        choices: list[Choice] = []
        for choice in self._choices:
            choices += [Choice(name) for name in schedulers(self._environ)] if choice.name == "auto" else [choice]
        made = make_watchers(choices, self._environ, clock=self._clock, grace_s=self._grace_s)
        if any(choice.name in SIGNALLING for choice in choices):
            self._heeded = frozenset().union(*(w.numbers for w in made if isinstance(w, SignalWatcher)))
        return made

    async def _resolve_clouds(self) -> list[Watcher]:
        from holdfast.notice.detect import detect, schedulers

        if all(choice.name != "auto" for choice in self._choices):
            return []
        known = {choice.name for choice in self._choices}
        found = set(await detect(self._environ)) - set(schedulers(self._environ)) - known
        clouds = [Choice(name) for name in sorted(found)]
        made = make_watchers(clouds, self._environ, clock=self._clock, grace_s=self._grace_s)
        return [watcher for watcher in made if not isinstance(watcher, SignalWatcher)]

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        except Exception as error:  # A flaw of ours must not end the training; it must be seen.
            self._trouble(f"listening has ended: {type(error).__name__}: {error}")
        finally:
            self._listening.set()
            # Without waiting for a name to be resolved in the loop's executor.
            self._loop.close()

    async def _listen(self) -> None:
        watching = asyncio.ensure_future(self._watch())
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, stopped):
            task.cancel()
        await asyncio.gather(stopped, return_exceptions=True)
        with suppress(asyncio.CancelledError):
            await watching

    async def _watch(self) -> None:
        # Files and signals are listened to while `auto` still looks around.
        names = [watcher.name for watcher in (*self._known, *self._more)]
        looking = asyncio.ensure_future(self._look_around(self._stream, names))
        notices = cast("AsyncGenerator[Notice, Any]", self._stream.notices())
        try:
            async with aclosing(notices):
                async for notice in notices:
                    try:
                        self._on_notice(notice)
                    except Exception as error:  # The consumer's flaw is recorded; the next notice is still told.
                        self._trouble(f"on_notice failed: {type(error).__name__}: {error}")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look_around(self, stream: Stream, names: list[str]) -> None:
        try:
            for watcher in await self._resolve_clouds():
                stream.add(watcher)
                names.append(watcher.name)
        except Exception as error:
            self._trouble(f"auto failed: {type(error).__name__}: {error}")
        self._names = tuple(names)
        self._emit("notice.listening", {"to": names})
        self._listening.set()

    def _trouble(self, what: str) -> None:
        self._emit("notice.trouble", {"source": "listener", "what": what, "times": 1})

    def _emit(self, name: str, fields: dict[str, Any]) -> None:
        with suppress(Exception):
            self._sink.emit(Event(name, self._clock.unix_s(), fields))
