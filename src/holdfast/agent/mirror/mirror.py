"""What the agent calls, and the thread that looks at the folder while the command runs.

    open ─→ (mend) ─→ watch ─→ … looks … ─→ finish ─→ last pass ─→ (mend) ─→ watch …      before and after each start of the command

The thread commits; the agent's main thread never waits for the store, except for a restore, and for the last pass as long as it
chooses to (`is_busy`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.agent.mirror.claim import claim_mirror
from holdfast.agent.mirror.folder import Names
from holdfast.agent.mirror.opening import mend, open_folder
from holdfast.agent.mirror.passes import Passes, Suspects
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.near import near_disk
from holdfast.checkpoint.read import Fallback
from holdfast.checkpoint.retain import Keep
from holdfast.core.clock import Clock
from holdfast.core.contract import EXIT_DONE, EXIT_PREEMPTED
from holdfast.core.errors import Fenced, HoldfastError, UsageError
from holdfast.core.events import Event, Sink
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.store.local import LocalStore

__all__ = ["Mirror", "MirrorOptions"]

_LOOK_AGAIN_S = 0.05
_READ_THREADS = 4
_LAST_TRIES = 3
_LONGEST_PAUSE_S = 60.0
_NEWEST = 5
_UNMEASURED_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorOptions:
    """`folder` is mirrored; `include` are patterns of what in it (empty: everything). Durations in seconds."""

    folder: Path
    include: tuple[str, ...] = ()
    settle_s: float = 2.0
    """How long a file must not have changed to count as complete."""
    look_every_s: float = 0.5
    keep: Keep = field(default_factory=Keep)

    def __post_init__(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--mirror {self.folder}: this is a file; name the folder that the command writes")
        if not (self.settle_s > 0 and self.look_every_s > 0):
            raise UsageError("a mirror's settle_s and look_every_s are more than 0 s")


class Mirror:
    """One mirrored folder for the life of an agent.

    Thread safety: the methods belong to the agent's main thread; `open_store` may be called from any. `stop` is called from the
    mirror's own thread when another attempt has taken the run over: the command must end.
    """

    def __init__(
        self,
        options: MirrorOptions,
        url: str,
        *,
        open_store: Callable[[str], Store],
        clock: Clock,
        tokens: TokenSource,
        sink: Sink,
        say: Callable[[str], None],
        stop: Callable[[], None],
        staged: str | None = None,
    ) -> None:
        """`staged`: a folder of copies of the run's objects on this machine (core.contract.ENV_STAGED)."""
        self._options, self._url, self._open_store = options, url, open_store
        self._clock, self._tokens, self._sink, self._say, self._stop = clock, tokens, sink, say, stop
        self._near = [near_disk(LocalStore(staged))] if staged else []
        # The folder itself, wherever a link to it leads: open files are compared by their real paths.
        self._root = options.folder.expanduser().resolve()
        self._reading = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="holdfast-mirror-read")
        self._stores: dict[str, Store] = {}
        self._passes: Passes | None = None
        self._suspects = Suspects(frozenset(), frozenset())
        self._ended = threading.Event()
        self._clean = False
        self._thread: threading.Thread | None = None
        self._commits_before = 0
        self._took_s: deque[float] = deque(maxlen=_NEWEST)
        self.attempt = 0
        """The number of the claimed attempt, 0 before."""
        self.fenced: Fenced | None = None
        self.unstored: str | None = None
        """Why the last state of the folder is not in the store, after `finish`."""

    # ---- the agent's side

    def open(self, *, fresh: bool = False) -> CheckpointRef | None:
        """Claim the run, and restore the folder (or keep it, by the rules of `opening`). Returns what was restored.

        Raises DifferentRun, RunRemoved, RestoreError, StoreUnsafe, and what the store raises: then the command must not start.
        """
        store = self._home(self._url)
        lineage = claim_mirror(
            store, fresh=fresh, clock=self._clock, tokens=self._tokens, warn=lambda text: self._say(f"mirror: {text}")
        )
        self.attempt = lineage.head.attempt
        passes = self._passes = Passes(
            self._root, Names(self._options.include), store, lineage, settle_s=self._options.settle_s, keep=self._options.keep,
            open_home=self._home, reading=self._reading, clock=self._clock, tokens=self._tokens, sink=self._sink, say=self._say,
        )  # fmt: skip
        restored = open_folder(
            passes, store, lineage.head, self._home, fresh=fresh, reading=self._reading, tokens=self._tokens, say=self._say,
            fell_back=self._fell_back, near=self._near,
        )  # fmt: skip
        if restored is None:
            return None
        self._emit(
            "mirror.restored", checkpoint=restored.ref.name, step=restored.ref.step, bytes=restored.ref.total_bytes
        )
        return restored.ref

    def watch(self, *, fresh: bool = False) -> None:
        """The command is about to be started: restore, or mend what its predecessor left; then look on. Raises as `open`."""
        if self._passes is None:
            self.open(fresh=fresh)
        passes = self._opened()
        mend(passes, self._suspects, reading=self._reading, tokens=self._tokens, say=self._say)
        self._suspects = Suspects(frozenset(), frozenset())
        self._commits_before = passes.data_commits
        self.unstored = None
        self._ended.clear()
        self._thread = threading.Thread(target=self._work, args=(passes,), name="holdfast-mirror", daemon=True)
        self._thread.start()

    def finish(self, exit_code: int) -> None:
        """The command has ended; the thread makes the last pass. Everything is taken as complete after exit codes 0 and 75."""
        self._clean = exit_code in (EXIT_DONE, EXIT_PREEMPTED)
        self._ended.set()

    def is_busy(self) -> bool:
        """Whether the last pass still goes on."""
        return self._thread is not None and self._thread.is_alive()

    def wait(
        self, pause: Callable[[float], None], is_stopping: Callable[[], bool], left_s: Callable[[], float]
    ) -> None:
        """Until the last pass is done; once the agent is told to stop, while seconds are left. `pause` lets signals in."""
        while self.is_busy():
            if not is_stopping():
                pause(_LOOK_AGAIN_S)
            elif left_s() > 0:
                self._clock.sleep(_LOOK_AGAIN_S)
            else:
                self.unstored = "there was no time left for it"
                self._say(
                    f"mirror: the last state of {self._root} was given up: {self.unstored}; the state before still stands"
                )
                return

    def expected_last_s(self) -> float:
        """What a last pass takes, judged by the slowest of the newest that had something to store."""
        return max(self._took_s, default=_UNMEASURED_S)

    def has_progressed(self) -> bool:
        """Whether a state with new data was committed since `watch`."""
        return self._opened().data_commits > self._commits_before

    def close(self) -> None:
        """Give up what is still being sent, and let go of the stores."""
        self._ended.set()
        if self._passes is not None:
            self._passes.close()
        self._reading.shutdown(wait=False, cancel_futures=True)
        if not self.is_busy():
            for store in self._stores.values():
                store.close()

    # ---- the thread

    def _work(self, passes: Passes) -> None:
        pause_s = self._options.look_every_s
        try:
            while not self._ended.wait(pause_s):
                try:
                    self._timed(passes, passes.look)
                    pause_s = self._options.look_every_s
                except Fenced:
                    raise
                except (HoldfastError, OSError) as error:
                    if pause_s == self._options.look_every_s:
                        self._failed(error, "it is tried again")
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self._suspects = passes.last(clean=self._clean)
            self._commit_last(passes)
        except Fenced as error:
            self.fenced, self.unstored = error, str(error)
            self._say(f"mirror: {error}")
            if not self._ended.is_set():
                self._stop()
        except Exception as error:
            self.unstored = f"{type(error).__name__}: {error}"
            self._failed(error, "the state before still stands")

    def _commit_last(self, passes: Passes) -> None:
        for left in reversed(range(_LAST_TRIES)):
            try:
                self._timed(passes, passes.commit_last)
                self.unstored = None
                return
            except Fenced:
                raise
            except (HoldfastError, OSError) as error:
                self._failed(error, "it is tried again" if left else "the state before still stands")
                self.unstored = str(error)

    def _timed(self, passes: Passes, one_pass: Callable[[], object]) -> None:
        commits, started_s = passes.data_commits, self._clock.monotonic_s()
        one_pass()
        if passes.data_commits > commits:
            self._took_s.append(self._clock.monotonic_s() - started_s)

    def _failed(self, error: Exception, then: str) -> None:
        self._emit("mirror.failed", error=str(error))
        self._say(f"mirror: the folder could not be stored: {error}; {then}")

    def _fell_back(self, fallback: Fallback) -> None:
        step, reason = fallback.checkpoint.step, fallback.reason
        self._say(f"mirror: state {step} does not verify and is passed over for an older one: {reason}")
        self._emit("restore.fell_back", checkpoint=fallback.checkpoint.name, reason=reason)

    def _opened(self) -> Passes:
        if self._passes is None:
            raise RuntimeError("the mirror has not been opened")
        return self._passes

    def _home(self, url: str) -> Store:
        if url not in self._stores:
            self._stores[url] = self._open_store(url)
        return self._stores[url]

    def _emit(self, name: str, **fields: object) -> None:
        self._sink.emit(Event(name, self._clock.unix_s(), fields))
