"""`holdfast.Run`: what a training script sees.

    track → (first loop) open, claim, restore → iterations with step boundaries → save when due → leave

The loop's thread does all of this; tensor bytes are written by the saver's thread (checkpoint/saver.py), events by the ledger's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol, TypeVar

import torch

from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.read import CheckpointReader, Fallback, restore_newest
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import SaveHandle, Saver, SaveRequest, SaverOptions
from holdfast.checkpoint.tree import Leaf, flatten
from holdfast.core.clock import Clock, SystemClock
from holdfast.core.config import Bytes, Duration, format_bytes, format_duration, parse_bytes
from holdfast.core.contract import ENV_CONTROL, ENV_PREVIOUS_STEP, EXIT_FENCED, Phase
from holdfast.core.errors import Fenced, Preempted, UsageError
from holdfast.core.ids import TokenSource, random_token
from holdfast.policy.interval import PreemptionRate, SaveEvery, parse_max_lost_work, parse_save_every
from holdfast.store.base import Store
from holdfast.store.open import normalise_url, open_store
from holdfast.train.boundary import StepGate
from holdfast.train.metadata import describe_environment, describe_state, hidden
from holdfast.train.metrics import Logger
from holdfast.train.notes import remember
from holdfast.train.opening import Claim, choose_url, identity_digest, open_run, wants_fresh
from holdfast.train.pacing import Pacing
from holdfast.train.place import Place
from holdfast.train.record import Record
from holdfast.train.restoring import Loaded, load_checkpoint
from holdfast.train.sample_seeds import IsolatedRandomness
from holdfast.train.saves import Saves
from holdfast.train.settings import Settings, plain_config
from holdfast.train.signals import LeaveNow, Signals
from holdfast.train.tracked import Tracker

__all__ = ["Run"]

Batch = TypeVar("Batch")
_READ_THREADS = 8
_LEAVE_WITHIN_S = 120.0
_END = object()
_SWAPPING_GENERATORS = (IsolatedRandomness.__enter__.__code__, IsolatedRandomness.__exit__.__code__)


class StoreFactory(Protocol):
    """Opens the store of a URL."""

    def __call__(self, url: str, *, options: Mapping[str, str] | None = None) -> Store: ...


class Run:
    """One logical piece of training under one URL, over all its attempts.

    url: where the run's state lives (`s3://…`, `gs://…`, `az://…`, `file:///…`, `./…`); default: `$HOLDFAST_RUN`, else
        `./runs/<script>`.
    save_every: `"500 steps"`, `"10 min"`, `"epoch"`, `"auto"`, or several of them; a save at the end is always made.
    keep: how many of the newest checkpoints stay; None keeps all.
    max_lost_work: with `"auto"`, the most work that one preemption may cost: a time, or a share of the expected runtime (`"2 %"`).
    max_unsaved: how many saves in a row may fail with a warning; one more raises TooManyUnsaved.
    staging_cap: the most host memory for snapshots on this machine (`"8 GiB"`); default two snapshots or 40 % of what is free.
    config: plain values that tell this experiment from others; part of its identity, shown when they change.
    seed: of the data order and per-sample randomness; default torch's initial seed. A resumed run keeps its first one.
    fresh: begin a new generation instead of resuming (the last checkpoint of the old one stays). Not on restarts by `holdfast run`.
    extend: go on training a run that is finished.
    strict: False loads what fits and warns about the rest.
    hyperparameters: `"checkpoint"` resumes with the optimizer settings that were saved; `"script"` applies those settings that
        the script has changed since. Either way the changes are shown.
    loggers: called with `(step, figures)` for every `log`, in order.
    store_options: the cloud client's own settings (endpoint, region, …).

    A *step* is one iteration of the loop over `batches`. Not thread-safe: a run belongs to the thread that trains.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        save_every: SaveEvery = "auto",
        keep: int | None = 3,
        max_lost_work: Duration = "10 min",
        max_unsaved: int = 3,
        staging_cap: Bytes | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int | None = None,
        fresh: bool = False,
        extend: bool = False,
        strict: bool = True,
        hyperparameters: Literal["checkpoint", "script"] = "checkpoint",
        loggers: Sequence[Logger] = (),
        store_options: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        tokens: TokenSource = random_token,
        open_store: StoreFactory = open_store,
    ) -> None:
        self._triggers = parse_save_every(save_every)
        self._bound = parse_max_lost_work(max_lost_work)
        if max_unsaved < 0 or (seed is not None and seed < 0):
            raise UsageError(f"max_unsaved ({max_unsaved}) and seed ({seed}) must not be negative")
        self._saver_options = SaverOptions(
            keep=Keep(last=keep),
            staging_cap_bytes=None if staging_cap is None else parse_bytes(staging_cap),
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
            max_unsaved=max_unsaved,
            hash_threads=max(1, min(8, os.cpu_count() or 1)),
        )
        script = sys.argv[0] if sys.argv else ""
        chosen, self._is_default_url = choose_url(None if url is None else os.fspath(url), os.environ, script)
        self._url = normalise_url(chosen)
        self._settings = Settings(plain_config(config), hyperparameters)
        self._fresh, self._extend, self._strict = fresh, extend, strict
        self._clock: Clock = clock or SystemClock()
        self._tokens = tokens
        self._open_store = lambda where: open_store(where, options=store_options)
        self._tracker = Tracker()
        self._record = Record(self._clock, loggers)
        self._signals = Signals(self._can_stop_at)
        self._place = Place(seed=seed, strict=strict, warn=self._record.warn)
        self._stores: dict[str, Store] = {}
        self._claim: Claim | None = None
        self._saver: Saver | None = None
        self._saves: Saves | None = None
        self._gate = StepGate({}, lambda: None)
        self._restored = False
        self._closed = False
        self._broken: str | None = None
        self._can_stop: Literal["waiting", "evaluating"] | None = None

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
        return self._opened().lineage is None

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; for people. 0 for a finished run that is only read."""
        lineage = self._opened().lineage
        return 0 if lineage is None else lineage.head.attempt

    # ---- tracking and restoring

    def track(self, **objects: Any) -> None:
        """Register what makes up the training state, by name. Nothing is read or written before `restore`.

        Takes anything with `state_dict` and `load_state_dict` (modules, optimizers, schedulers, GradScaler, EMA, metrics),
        tensors and numpy arrays, dicts and lists of plain values, and random generators. The global random generators are
        included unasked. Raises UsageError for anything else, and once the run has been restored.
        """
        if self._claim is not None:
            raise UsageError(
                "track() comes before restore(), before the first loop and before anything is asked of the run: what is tracked "
                "is restored together"
            )
        self._tracker.add(objects)

    def restore(self) -> bool:
        """Claim the run and make every tracked object equal to its newest checkpoint that verifies. Implied by the first loop.

        Returns True when there was a checkpoint. Raises TrackedStateMismatch (nothing has changed then), RestoreError,
        DifferentRun, RunRemoved, and what the store raises.
        """
        if self._broken:
            raise UsageError(self._broken)
        if self._claim is not None:
            return self._restored
        if self._closed:
            raise UsageError("the run is closed; make a new Run to go on")
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version checkpoints runs of one process. "
                "Use one process, or keep your framework's own checkpoints for now"
            )
        self._tracker.check()
        self._signals.install()
        try:
            self._record.meet_agent(os.environ)
            self._record.entered(Phase.RESTORING)
            self._restored = self._open_and_load()
        except BaseException as error:
            self._broken = (
                f"restore() failed ({type(error).__name__}), so this run cannot go on; the error above says why"
            )
            self.close(wait=False)
            raise
        return self._restored

    def _open_and_load(self) -> bool:
        self._settings.observe(self._tracker.optimizers(), describe_environment())
        claim = open_run(
            self._home(self._url),
            is_default_url=self._is_default_url,
            identity=identity_digest(self._tracker.describe(), self._settings.config),
            fresh=wants_fresh(self._fresh, os.environ),
            extend=self._extend,
            clock=self._clock,
            tokens=self._tokens,
            warn=self._record.warn,
        )
        self._claim = claim
        if claim.lineage is not None:
            self._saver = self._start_saver(claim.lineage)
        restored = self._load(claim)
        if self._place.seed is None:
            self._place.seed = torch.initial_seed() & (2**63 - 1)
        if self._saver is not None:
            self._saves = self._start_saves(self._saver, claim)
        self._announce(claim, restored)
        return restored is not None

    def _start_saver(self, lineage: Lineage) -> Saver:
        return Saver(
            self._home(self._url),
            lineage,
            options=self._saver_options,
            open_home=self._home,
            clock=self._clock,
            tokens=self._tokens,
            sink=self._record.open(self._home(self._url), lineage.head.attempt),
            before_commit=self._record.flush,
            committed=lambda ref: self._record.committed(ref.step),
        )

    def _start_saves(self, saver: Saver, claim: Claim) -> Saves:
        self._gate = StepGate(self._tracker.optimizers(), saver.release)
        pacing = Pacing(self._triggers, self._bound, self._rate(claim), self._clock)
        pacing.begin(self._place.step)
        return Saves(saver, self._gate, pacing, self._place, self._capture, self._record)

    def _rate(self, claim: Claim) -> PreemptionRate:
        """What this run itself has seen: every attempt but this one ended before its time."""
        head = claim.head
        if head is None or claim.record.created_unix_s == 0:
            return PreemptionRate()
        exposure_s = max(0.0, self._clock.unix_s() - claim.record.created_unix_s)
        return PreemptionRate().observed(max(0, head.attempt - 1), exposure_s)

    def _load(self, claim: Claim) -> CheckpointReader | None:
        head = claim.head
        if head is None:
            return None
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="holdfast-read") as pool:

            def load(reader: CheckpointReader) -> tuple[CheckpointReader, Loaded]:
                return reader, load_checkpoint(reader, self._tracker, pool, strict=self._strict)

            found = restore_newest(self._home(self._url), head, self._home, load, fell_back=self._fell_back)
        if found is None:
            return None
        reader, loaded = found
        self._adopt(reader, loaded)
        return reader

    def _adopt(self, reader: CheckpointReader, loaded: Loaded) -> None:
        for line in loaded.skipped:
            self._record.warn(f"strict=False left this out: {line}")
        asked, place = self._place.seed, self._place
        for line in place.resume(loaded.own):
            self._record.warn(line)
        if asked is not None and asked != place.seed:
            self._record.warn(f"seed={asked} is ignored: this run's data order was begun with seed {place.seed}")
        self._settings.reconcile(reader.root.metadata, self._tracker.optimizers(), self._record.say)
        if self._saver is not None:
            self._saver.known.add(reader.ref.name, reader.part, home=reader.ref.home)
            self._saver.roots.remember(reader.root)

    def _fell_back(self, fallback: Fallback) -> None:
        self._record.warn(
            f"the checkpoint of step {fallback.checkpoint.step} does not verify and is passed over for an older one: "
            f"{fallback.reason}"
        )
        self._record.emit("restore.fell_back", checkpoint=fallback.checkpoint.name, reason=fallback.reason)

    def _announce(self, claim: Claim, restored: CheckpointReader | None) -> None:
        step, position, record = self._place.step, self._place.position, self._record
        if claim.lineage is None:
            record.say(f"{self._url}: this run is finished at step {step}; nothing is trained. Go on with extend=True")
            record.entered(Phase.FINISHED)
            return
        previous = int(os.environ.get(ENV_PREVIOUS_STEP) or -1)
        record.emit(
            "attempt.started",
            step=step,
            epoch=position.epoch,
            previous_step=previous,
            restored=restored.ref.name if restored else None,
            environment=self._settings.environment,
        )
        where = f"resumes at step {step} (epoch {position.epoch}, batch {position.batch})" if restored else "starts"
        lost = f"; {previous - step} steps are computed again" if previous > step else ""
        record.say(f"{self._url}: attempt {claim.lineage.head.attempt} {where}{lost}")
        record.restored(step)
        record.entered(Phase.TRAINING)

    # ---- loops

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left, starting in the one that the checkpoint was made in."""
        if self._opened().lineage is None:
            return
        token = self._place.enter_epochs(total)
        try:
            while self._place.position.epoch < total:
                yield self._place.begin_epoch()
                self._place.leave_open_loop(counts=self._gate.any_stepped)
                self._place.end_epoch()
                self._boundary(epoch_ended=True)
        finally:
            self._place.leave_epochs(token)

    def batches(self, loader: Iterable[Batch], *, epochs: int | None = None) -> Iterator[Batch]:
        """The batches that are left of this epoch, starting at the exact next one; with `epochs`, of all epochs in one loop.

        Inside `epochs()`, several loops over batches may follow each other in one epoch; those that are done are skipped. Code
        between two loops runs again when the second is resumed. Outside of `epochs()` and without `epochs`, it is one pass.
        """
        if epochs is None and self._place.in_iteration:
            yield from self._one_loop(loader, nested=True)
            return
        self._place.refuse_second_loop()
        if epochs is None:
            self._place.refuse_second_pass()
        for _ in self.epochs(1 if epochs is None else epochs):
            yield from self._one_loop(loader, nested=False)

    def _one_loop(self, loader: Iterable[Batch], *, nested: bool) -> Iterator[Batch]:
        place, gate, saves = self._place, self._gate, self._saves
        token = place.enter_loop(loader)
        if token is None or saves is None or place.current is None:
            return
        self._tracker.driven(loader)
        # What is only held in memory was for leaving during the code between two loops.
        saves.drop_held()
        can_stop: Literal["waiting"] | None = "waiting" if place.can_stop_waiting else None
        stream = place.current.iterate(place.position.epoch, place.position.batch)
        try:
            while True:
                try:
                    self._can_stop = can_stop
                    batch = next(stream, _END)
                    self._can_stop = None
                except LeaveNow:
                    self._leave()
                if batch is _END:
                    break
                place.batch_begins()
                gate.begin_iteration()
                yield batch  # type: ignore[misc]
                # The user may let go of a batch while the next one is made: so must we.
                del batch
                place.batch_done()
                self._boundary()
        finally:
            self._can_stop = None
            place.leave_loop(token, counts=gate.any_stepped)
        if nested:
            saves.hold()

    # ---- boundaries and saves

    def _boundary(self, *, epoch_ended: bool = False) -> None:
        saves = self._saves
        if saves is None:
            return
        self._record.stepped(self._place.step)
        saves.check()
        if self._signals.leaving is None:
            saves.boundary(epoch_ended=epoch_ended)
        elif saves.may_copy():
            self._leave()

    def save(self) -> SaveHandle:
        """Save at the next step boundary, and return a handle at once.

        Inside an iteration of a loop, over batches or over epochs, the save is made when that iteration is complete: only there
        does a resume repeat nothing and leave nothing out. Outside of loops it is made now. A failure shows when
        `handle.wait()` is called, and as a warning at a later boundary; see `max_unsaved`.
        """
        self._opened()
        if self._saves is None:
            raise UsageError(f"{self._url}: the run is finished and only read; pass extend=True to go on")
        if self._closed:
            raise UsageError("the run is closed: nothing can be saved any more")
        return self._saves.ask()

    def _capture(self, reason: str, finish: bool) -> SaveRequest:
        place, tracker = self._place, self._tracker
        own = {**place.state(), "parameters": tracker.parameters()}
        metadata = {
            "step": place.step,
            "epoch": place.position.epoch,
            "batch": place.position.batch,
            **describe_state(tracker.optimizers(), tracker.modules()),
            "batch_size": place.batch_size,
            "seed": place.seed,
            "world_size": 1,
            "config": hidden(self._settings.config),
            "script_hyperparameters": self._settings.script,
            "environment": self._settings.environment,
            "tracked": tracker.names(),
        }
        return SaveRequest(
            flat=flatten({"tracked": tracker.state(), "holdfast": own}),
            step=place.step,
            epoch=place.position.epoch,
            metadata=metadata,
            reason=reason,
            deferrable=self._deferrable(),
            finish=finish,
        )

    def _deferrable(self) -> Callable[[Leaf], bool]:
        """On CUDA, parameters and optimizer state are written by optimizers only, so their copy may overlap forward and backward."""
        owned: set[int] = set()
        if torch.cuda.is_available():
            for optimizer in self._tracker.optimizers().values():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        owned.add(parameter.data_ptr())
                        owned.update(
                            value.data_ptr()
                            for value in optimizer.state.get(parameter, {}).values()
                            if isinstance(value, torch.Tensor)
                        )
        return lambda leaf: isinstance(leaf.value, torch.Tensor) and leaf.value.data_ptr() in owned

    # ---- regions

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation. Interrupted, it is done again after resume, never skipped.

        Between loops over batches, a SIGTERM ends it at once and the state from before is saved. Inside an iteration it is run
        to its end first, since the iteration is not complete.
        """
        self._opened()
        saves, place = self._saves, self._place
        self._record.entered(Phase.EVALUATING)
        if saves is not None and not place.in_iteration:
            saves.hold()
        try:
            # After a `break` nothing is held: it cannot be told from an exception, which must not make a checkpoint.
            self._can_stop = "evaluating" if saves is not None and not place.in_batch and not place.cut else None
            if self._can_stop and self._signals.leaving is not None:
                raise LeaveNow
            yield
            self._can_stop = None
        except LeaveNow:
            if saves is not None:
                self._depart(saves.leave_with_held(_LEAVE_WITHIN_S))
        finally:
            self._can_stop = None
            self._record.entered(Phase.TRAINING)

    @contextmanager
    def mutating(self) -> Iterator[None]:
        """A region in which the tracked state must not be copied: EMA weights swapped in, the ascent step of SAM."""
        self._opened()
        if self._saves is None:
            yield
            return
        with self._saves.mutating():
            yield

    def _can_stop_at(self, frame: FrameType | None) -> bool:
        """In the signal handler. An evaluation may be given up anywhere, since what is saved was held before it. While a batch is
        awaited the live state is saved, so it must be at a boundary, and the generators must not be half swapped."""
        if self._can_stop == "evaluating":
            return True
        if self._can_stop is None or self._saves is None:
            return False
        while frame is not None:
            if frame.f_code in _SWAPPING_GENERATORS:
                return False
            frame = frame.f_back
        return self._saves.may_copy()

    # ---- record

    def log(self, **figures: Any) -> None:
        """Record figures of this step (numbers, or tensors of one element). Never waits for the GPU."""
        self._opened()
        self._record.log(self._place.step, self._place.position.epoch, figures)

    def remember(self, name: str, make: Callable[[], str]) -> str:
        """A text that is made once and is the same in all attempts: an experiment id that a tracking server hands out."""
        self._opened()
        return remember(self._home(self._url), name, make)

    # ---- leaving

    def _leave(self) -> None:
        """At a boundary, told to go: save what is new, wait until it is durable, leave."""
        if self._saves is not None:
            self._record.entered(Phase.LEAVING)
            self._depart(self._saves.leave_with_live(_LEAVE_WITHIN_S))

    def _depart(self, durable: bool) -> None:
        code, step = self._signals.leaving or 0, self._place.step
        self._record.entered(Phase.LEAVING)
        self._record.emit("attempt.leaving", step=step, code=code, drained=durable)
        if self._saves is not None:
            self._saves.stop_if_fenced()
        saved = "" if durable else "; the newest steps could NOT be saved and will be computed again"
        self._record.say(f"leaving at step {step} with exit code {code}{saved}; start the same command again to go on")
        raise Preempted(code) from None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaving normally after a loop makes the last checkpoint and marks the run finished, also when the loop was left with `break`.

        An exception makes no checkpoint: the step is incomplete. A run that was only restored is left as it is.
        """
        try:
            if error is None and self._saves is not None and not self._closed and self._place.has_looped:
                self._finish(self._saves)
            elif error is not None and not isinstance(error, Preempted | Fenced):
                self._record.emit("attempt.failed", step=self._place.step, error=f"{type(error).__name__}: {error}")
        finally:
            self.close(wait=not isinstance(error, KeyboardInterrupt | Fenced))
        if isinstance(error, Fenced) and ENV_CONTROL in os.environ:
            self._record.say(str(error))
            raise SystemExit(EXIT_FENCED) from error

    def _finish(self, saves: Saves) -> None:
        """The loops are done, so a wish to leave is granted by finishing: it costs the same one save, and nothing has to come back."""
        self._place.leave_open_loop(counts=self._gate.any_stepped)
        ref = saves.save("finished", finish=True).wait()
        self._record.entered(Phase.FINISHED)
        self._record.say(f"finished at step {ref.step} after {format_duration(saves.elapsed_s)}")
        self._record.emit("attempt.finished", step=ref.step)

    def close(self, *, wait: bool = True) -> None:
        """Let go of everything. With `wait`, saves that are under way are finished first. Marks nothing as finished."""
        if self._closed:
            return
        self._closed = True
        timeout_s = _LEAVE_WITHIN_S if wait else 0.0
        try:
            if self._saves is not None:
                self._saves.close(timeout_s)
            elif self._saver is not None:
                self._saver.close(timeout_s=timeout_s)
        finally:
            try:
                self._record.close(wait=wait)
            finally:
                self._signals.remove()

    # ---- internals

    def _opened(self) -> Claim:
        """The claim; the first that needs it restores."""
        if self._claim is None or self._broken:
            self.restore()
        if self._claim is None:
            raise UsageError("the run has not been opened")
        return self._claim

    def _home(self, url: str) -> Store:
        """The store of this run, or of another one that a fork refers to."""
        known = self._stores.get(url)
        if known is None:
            known = self._stores[url] = self._open_store(url)
        return known

    def __repr__(self) -> str:
        head = self._claim.head if self._claim else None
        size = format_bytes(head.checkpoints[-1].total_bytes) if head and head.checkpoints else "no checkpoint"
        return f"<Run {self._url} step {self._place.step}, {size}>"
