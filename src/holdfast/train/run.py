"""`holdfast.Run`: what a training script sees.

    track → (first loop) open, claim, restore → iterations with step boundaries → save when due → leave

The loop's thread does all of this; tensor bytes are written by the saver's thread (checkpoint/saver.py), events by the ledger's.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal

from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import SaveHandle, SaverOptions
from holdfast.checkpoint.tier import LocalTier
from holdfast.core.clock import Clock, SystemClock
from holdfast.core.config import Bytes, Duration, format_bytes, parse_bytes, parse_duration_s
from holdfast.core.contract import ENV_CONTROL, EXIT_FENCED, Phase
from holdfast.core.errors import Fenced, Preempted, UsageError
from holdfast.core.ids import TokenSource, random_token
from holdfast.ledger.doings import Doing
from holdfast.notice.base import Notice
from holdfast.notice.words import as_notice, as_word
from holdfast.policy.interval import SaveEvery, parse_max_lost_work, parse_save_every
from holdfast.store.open import normalise_url, open_store
from holdfast.train.base import choose_base
from holdfast.train.batching import Batching
from holdfast.train.crossing import Crossing
from holdfast.train.display import display_for
from holdfast.train.emergency import Emergency
from holdfast.train.hearing import Hearing
from holdfast.train.leaving import LEAVE_WITHIN_S, Leaving
from holdfast.train.loops import Loops
from holdfast.train.metrics import Logger
from holdfast.train.notes import remember
from holdfast.train.opening import Claim, StoreFactory, choose_url
from holdfast.train.place import Place
from holdfast.train.ranks.joining import join
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.words import decode_notice, encode_notice
from holdfast.train.ranks.world import World, find_world
from holdfast.train.record import Record
from holdfast.train.session import Session, SessionOptions
from holdfast.train.settings import Settings, plain_config
from holdfast.train.signals import Signals
from holdfast.train.tracked import Tracker

__all__ = ["Run"]

_open_runs: weakref.WeakSet[Run] = weakref.WeakSet()


class Run(Batching):
    """One logical piece of training under one URL, over all its attempts.

    url: where the run's state lives (`s3://…`, `gs://…`, `az://…`, `file:///…`, `./…`); default: `$HOLDFAST_RUN`, else
        `./runs/<script>`.
    base: another run, or one step of it (`"s3://bucket/runs/gpt@12000"`): tensors that are the same there are referred to and not
        sent. Nothing is loaded from it. The base keeps that checkpoint's bytes for as long as this run's checkpoints need them.
    save_every: `"500 steps"`, `"10 min"`, `"epoch"`, `"auto"`, or several of them; a save at the end is always made.
    keep: how many of the newest checkpoints stay; None keeps all. `Keep(last=3, every="6 h", best="validation_loss")` also
        keeps one per so much time, and the best by a logged metric.
    max_lost_work: with `"auto"`, the most work that one preemption may cost: a time, or a share of the expected runtime (`"2 %"`).
        Kept at any price. By default ten minutes, as far as saves take no more than 1 % of the time for it.
    max_unsaved: how many saves in a row may fail with a warning; one more raises TooManyUnsaved.
    commit_timeout: with several ranks, how long one save waits for the slowest before it fails.
    local: a folder on a fast disk of this machine, or a `LocalTier`: checkpoints are written there first, which is quick, go on to
        the URL in the background, and are restored from there when it has them. Only what is at the URL counts as saved.
    staging_cap: the most host memory for snapshots on this machine (`"8 GiB"`); default two snapshots or 40 % of what is free.
    config: plain values that tell this experiment from others; part of its identity, shown when they change.
    seed: of the data order and per-sample randomness; default torch's initial seed. A resumed run keeps its first one.
    fresh: begin a new generation instead of resuming (the last checkpoint of the old one stays). Not on restarts by `holdfast run`.
    extend: go on training a run that is finished.
    strict: False loads what fits and warns about the rest.
    hyperparameters: `"checkpoint"` resumes with the optimizer settings that were saved; `"script"` applies those settings that
        the script has changed since. Either way the changes are shown.
    notice: where to listen for word that this machine is going (`"auto"`, `"aws"`, `"file:/path"`, `"none"`, …); default:
        `$HOLDFAST_NOTICE`, else `"auto"`. Under `holdfast run` the agent listens.
    progress: False shows no progress; a duration is the time between two lines. Default: a line that is kept up to date on a
        terminal, else one every minute.
    loggers: called with `(step, figures)` for every `log`, in order.
    store_options: the cloud client's own settings (endpoint, region, …).

    A *step* is one iteration of the loop over `batches`, or all micro-batches of one `global_batch`. Not thread-safe: a run
    belongs to the thread that trains.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        save_every: SaveEvery = "auto",
        keep: int | Keep | None = 3,
        max_lost_work: Duration | None = None,
        max_unsaved: int = 3,
        commit_timeout: Duration = "10 min",
        local: str | os.PathLike[str] | LocalTier | None = None,
        staging_cap: Bytes | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int | None = None,
        fresh: bool = False,
        extend: bool = False,
        strict: bool = True,
        hyperparameters: Literal["checkpoint", "script"] = "checkpoint",
        notice: str | None = None,
        progress: bool | Duration | None = None,
        loggers: Sequence[Logger] = (),
        store_options: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        tokens: TokenSource = random_token,
        open_store: StoreFactory = open_store,
    ) -> None:
        if max_unsaved < 0 or (seed is not None and seed < 0):
            raise UsageError(f"max_unsaved ({max_unsaved}) and seed ({seed}) must not be negative")
        saver_options = SaverOptions(
            keep=keep if isinstance(keep, Keep) else Keep(last=keep),
            staging_cap_bytes=None if staging_cap is None else parse_bytes(staging_cap),
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
            max_unsaved=max_unsaved,
            hash_threads=max(1, min(8, os.cpu_count() or 1)),
        )
        script = sys.argv[0] if sys.argv else ""
        chosen, is_default_url = choose_url(None if url is None else os.fspath(url), os.environ, script)
        self._url = normalise_url(chosen)
        self._clock = clock = clock or SystemClock()
        self._commit_timeout_s = parse_duration_s(commit_timeout)
        self._tracker = Tracker()
        self._record = Record(clock, loggers, display_for(progress, clock, os.environ))
        self._signals = Signals(lambda: self._session.saves is not None and self._session.saves.may_copy(), clock)
        self._place = Place(seed=seed, strict=strict, warn=self._record.warn, say=self._record.say)
        self._hearing = Hearing(notice, clock, self._record.emit, self._record.say)
        self._session = Session(
            SessionOptions(
                url=self._url,
                is_default_url=is_default_url,
                fresh=fresh,
                extend=extend,
                strict=strict,
                triggers=parse_save_every(save_every),
                bound=None if max_lost_work is None else parse_max_lost_work(max_lost_work),
                saver=saver_options,
                base=None if base is None else choose_base(os.fspath(base), self._url),
                local=local if local is None or isinstance(local, LocalTier) else LocalTier(local),
            ),
            tracker=self._tracker,
            place=self._place,
            settings=Settings(plain_config(config), hyperparameters),
            record=self._record,
            open_store=lambda where: open_store(where, options=store_options),
            legacy=self._hearing.legacy,
            inherited=self._hearing.inherited,
            forget_inherited=self._hearing.forget_inherited,
            clock=clock,
            tokens=tokens,
        )
        self._emergency = Emergency(clock, self._record, self._signals, self._place, self._hearing.acknowledge)
        self._leaving = Leaving(self._place, self._record, self._signals, self._emergency)
        self._crossing = Crossing(self._place, self._record, self._signals, self._emergency, self._leaving)
        self._loops = Loops(
            self._session, self._tracker, self._place, self._record, self._signals, self._leaving, self._crossing
        )
        self._together: Together | None = None
        self._closed = False
        self._broken: str | None = None

    # ---- what a script reads. Each of these restores first, so that it is never the answer of a run that has just begun.

    @property
    def url(self) -> str:
        """Where the run lives, without credentials."""
        return self._url

    @property
    def id(self) -> str:
        """The run's identity, the same over all attempts: `wandb.init(id=run.id, resume="allow")`."""
        return self._opened().record.run_id

    @property
    def step(self) -> int:
        """Completed iterations over all attempts; what was computed and lost does not count."""
        self._opened()
        return self._place.step

    @property
    def epoch(self) -> int:
        """The epoch that the loop is in, from 0."""
        self._opened()
        return self._place.position.epoch

    @property
    def batch(self) -> int:
        """Batches of this epoch's loop that are done; during an iteration, the number of the batch at hand."""
        self._opened()
        return self._place.position.batch

    @property
    def finished(self) -> bool:
        """True when the run was complete before this start: the loops yield nothing, and nothing is written."""
        return self._opened().finished

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; for people. 0 for a finished run that is only read."""
        claim = self._opened()
        return 0 if claim.finished or claim.head is None else claim.head.attempt

    # ---- tracking and restoring

    def track(self, **objects: Any) -> None:
        """Register what makes up the training state, by name. Nothing is read or written before `restore`.

        Takes anything with `state_dict` and `load_state_dict` (modules, optimizers, schedulers, GradScaler, EMA, metrics),
        tensors and numpy arrays, dicts and lists of plain values, and random generators. The global random generators are
        included unasked. Raises UsageError for anything else, and once the run has been restored.
        """
        if self._session.claim is not None:
            raise UsageError(
                "track() comes before restore(), before the first loop and before anything is asked of the run: what is tracked "
                "is restored together"
            )
        self._tracker.add(objects)

    def restore(self) -> bool:
        """Claim the run and make every tracked object equal to its newest checkpoint that verifies. Implied by the first loop.

        Returns True when there was a checkpoint. Raises TrackedStateMismatch (nothing has changed then), RestoreError,
        DifferentRun, RunRemoved, UsageError for a base that is not there, and what the store raises.
        """
        if self._broken:
            raise UsageError(self._broken)
        if self._session.claim is not None:
            return self._session.restored
        if self._closed:
            raise UsageError("the run is closed; make a new Run to go on")
        world = find_world(os.environ)
        self._tracker.check()
        _open_runs.add(self)
        self._signals.install(os.environ)
        try:
            if world.rank > 0:
                self._record.mute()
            # One process of each machine speaks with its agent, and listens for its notices.
            if world.local_rank == 0:
                self._record.meet_agent(os.environ)
                self._hearing.start(os.environ, self._heard)
            else:
                self._hearing.join_silently(os.environ)
            self._signals.tell(self._hearing.received)
            self._record.entered(Phase.RESTORING)
            self._record.stopwatch.enter(Doing.RESTORE)
            if not world.is_alone:
                self._join(world)
            self._session.open(self._together)
            if self._session.saves is not None:
                self._emergency.attend(self._session.saves)
            self._record.stopwatch.enter(Doing.PREPARATION)
        except BaseException as error:
            self._broken = f"restore() failed ({type(error).__name__}), so this run cannot go on; that error says why"
            self._tell_end(error)
            self.close(wait=False)
            raise
        return self._session.restored

    def _join(self, world: World) -> None:
        """Meet the other ranks of the job."""
        self._place.joins(world.rank, world.size)
        self._together = join(
            world, os.environ, self._clock, lambda word: self._emergency.heard(as_notice(decode_notice(word))),
            commit_timeout_s=self._commit_timeout_s,
        )  # fmt: skip
        self._emergency.join(coordinates=self._together.coordinates)
        self._crossing.join(self._together)

    def _heard(self, notice: Notice) -> None:
        """By this process itself, from any thread."""
        self._emergency.heard(notice)
        if self._together is not None:
            self._together.tell(encode_notice(as_word(notice)))

    # ---- loops

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left, starting in the one that the checkpoint was made in."""
        self._opened()
        yield from self._loops.epochs(total)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation. Interrupted, it is done again after resume, never skipped.

        Between loops over batches, a SIGTERM ends it at once and the state from before is saved. Inside an iteration it is run
        to its end first, since the iteration is not complete.
        """
        self._opened()
        with self._loops.evaluating():
            yield

    @contextmanager
    def mutating(self) -> Iterator[None]:
        """A region in which the tracked state must not be copied: EMA weights swapped in, the ascent step of SAM."""
        self._opened()
        if self._session.saves is None:
            yield
            return
        with self._session.saves.mutating():
            yield

    # ---- saves

    def save(self) -> SaveHandle:
        """Save at the next step boundary, and return a handle at once.

        Inside an iteration of a loop, over batches or over epochs, the save is made when that iteration is complete: only there
        does a resume repeat nothing and leave nothing out. Outside of loops it is made now. A failure shows when
        `handle.wait()` is called, and as a warning at a later boundary; see `max_unsaved`.
        """
        self._opened()
        if self._session.saves is None:
            raise UsageError(f"{self._url}: the run is finished and only read; pass extend=True to go on")
        if self._closed:
            raise UsageError("the run is closed: nothing can be saved any more")
        return self._session.saves.ask()

    # ---- record

    def log(self, **figures: Any) -> None:
        """Record figures of this step (numbers, or tensors of one element). Never waits for the GPU."""
        self._opened()
        self._record.log(self._place.step, self._place.position.epoch, figures)

    def remember(self, name: str, make: Callable[[], str]) -> str:
        """A text that is made once and is the same in all attempts: an experiment id that a tracking server hands out."""
        self._opened()
        return remember(self._session.store, name, make)

    # ---- leaving

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaving normally after a loop (also one left with `break`) makes the last checkpoint and marks the run finished.

        An exception makes no checkpoint: the step is incomplete. A run that was only restored is left as it is.
        """
        try:
            if error is None and self._session.saves is not None and not self._closed and self._place.has_looped:
                self._place.leave_open_loop(counts=self._session.gate.any_stepped)
                self._leaving.finish(self._session.saves)
            elif error is not None and not isinstance(error, Preempted):
                self._tell_end(error)
        finally:
            self.close(wait=not isinstance(error, KeyboardInterrupt | Fenced))
        if isinstance(error, Fenced) and ENV_CONTROL in os.environ:
            self._record.say(str(error))
            raise SystemExit(EXIT_FENCED) from error

    def close(self, *, wait: bool = True) -> None:
        """Let go of everything. With `wait`, saves that are under way are finished first. Marks nothing as finished."""
        if self._closed:
            return
        self._closed = True
        _open_runs.discard(self)
        with ExitStack() as ending:
            ending.callback(self._session.let_go)
            ending.callback(self._signals.remove)
            ending.callback(self._hearing.close)
            ending.callback(self._emergency.close)
            ending.callback(self._record.close, wait=wait)
            if self._together is not None:
                ending.callback(self._together.close)
            ending.callback(self._session.close, LEAVE_WITHIN_S if wait else 0.0)

    # ---- internals

    def _tell_end(self, error: BaseException) -> None:
        name = "attempt.fenced" if isinstance(error, Fenced) else "attempt.failed"
        self._record.emit(name, **self._record.stopwatch.totals(), error=f"{type(error).__name__}: {error}")

    def _opened(self) -> Claim:
        """The claim; the first that needs it restores."""
        if self._session.claim is None or self._broken:
            self.restore()
        if self._session.claim is None:
            raise UsageError("the run has not been opened")
        return self._session.claim

    def __repr__(self) -> str:
        head = self._session.claim.head if self._session.claim else None
        size = format_bytes(head.checkpoints[-1].total_bytes) if head and head.checkpoints else "no checkpoint"
        return f"<Run {self._url} step {self._place.step}, {size}>"


@atexit.register
def _tell_left_open() -> None:
    """A run without `with` never learns whether all went well."""
    for run in _open_runs:
        if run._session.saves is not None:
            run._record.say(
                f"{run._url}: the script has ended without leaving the run: the last checkpoint was not made, and the run is not "
                "finished. Write `with holdfast.Run(…) as run:`"
            )
