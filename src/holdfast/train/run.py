"""`holdfast.Run`: what a training script sees.

    track → (first loop) open, claim, restore → iterations with step boundaries → save when due → leave

The loop's thread does all of this; tensor bytes are written by the saver's thread (checkpoint/saver.py), events by the ledger's.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

from holdfast.checkpoint.format import Head
from holdfast.checkpoint.read import CheckpointReader, Fallback, restore_newest
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import SaveHandle, Saver, SaveRequest, SaverOptions
from holdfast.checkpoint.tree import FlatTree, Leaf, flatten
from holdfast.core.clock import Clock, SystemClock
from holdfast.core.config import Bytes, Duration, format_bytes, format_duration, parse_bytes
from holdfast.core.contract import ENV_CONTROL, ENV_PREVIOUS_STEP, EXIT_FENCED, Phase, ProgressPage
from holdfast.core.errors import Fenced, HoldfastWarning, Preempted, UsageError
from holdfast.core.events import Event
from holdfast.core.ids import TokenSource, random_token
from holdfast.data.position import Position
from holdfast.ledger.append import Ledger
from holdfast.policy.interval import PreemptionRate, SaveEvery, parse_max_lost_work, parse_save_every
from holdfast.store.base import Store
from holdfast.store.open import normalise_url, open_store
from holdfast.train.boundary import StepGate
from holdfast.train.loader import ResumableLoader
from holdfast.train.metadata import describe_environment, differences, hyperparameters
from holdfast.train.metrics import Logger, Metrics
from holdfast.train.notes import remember
from holdfast.train.opening import Claim, choose_url, identity_digest, open_run, wants_fresh
from holdfast.train.pacing import Pacing
from holdfast.train.restoring import Loaded, load_checkpoint
from holdfast.train.rng import capture_rng, restore_rng
from holdfast.train.signals import Signals
from holdfast.train.tracked import Tracker

__all__ = ["Run"]

Batch = TypeVar("Batch")
_READ_THREADS = 8
_LEAVE_WITHIN_S = 120.0
_DEFERRAL_WARNING = 10_000


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
    ) -> None:
        self._triggers = parse_save_every(save_every)
        self._bound = parse_max_lost_work(max_lost_work)
        self._saver_options = SaverOptions(
            keep=Keep(last=keep),
            staging_cap_bytes=None if staging_cap is None else parse_bytes(staging_cap),
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            max_unsaved=max_unsaved,
            hash_threads=max(1, min(8, os.cpu_count() or 1)),
        )
        if hyperparameters not in ("checkpoint", "script"):
            raise UsageError(f'hyperparameters must be "checkpoint" or "script", not {hyperparameters!r}')
        script = sys.argv[0] if sys.argv else ""
        chosen, self._is_default_url = choose_url(None if url is None else os.fspath(url), os.environ, script)
        self._url = normalise_url(chosen)
        self._config = dict(config) if config is not None else None
        self._seed = seed
        self._fresh, self._extend, self._strict, self._hyperparameters = fresh, extend, strict, hyperparameters
        self._loggers, self._store_options = tuple(loggers), store_options
        self._clock: Clock = clock or SystemClock()
        self._tokens = tokens
        self._tracker = Tracker()
        self._signals = Signals(self._abandon)
        self._position = Position()
        self._step = 0
        self._store: Store | None = None
        self._homes: dict[str, Store] = {}
        self._claim: Claim | None = None
        self._saver: Saver | None = None
        self._ledger: Ledger | None = None
        self._metrics: Metrics | None = None
        self._page: ProgressPage | None = None
        self._gate: StepGate | None = None
        self._pacing: Pacing | None = None
        self._finished = False
        self._restored = False
        self._closed = False
        self._broken: str | None = None
        self._loaders: dict[int, tuple[object, ResumableLoader]] = {}
        self._loader_state: Any = None
        self._current: ResumableLoader | None = None
        self._batch_size: int | None = None
        self._goal_epochs: int | None = None
        self._phase: int | None = None
        self._in_body = False
        self._mutating = 0
        self._interruptible = False
        self._deferred_since: int | None = None
        self._asked: SaveHandle | None = None
        self._environment: dict[str, Any] = {}
        self._script_hyperparameters: dict[str, Any] = {}

    # ---- what a script reads

    @property
    def url(self) -> str:
        """Where the run lives, without credentials."""
        return self._url

    @property
    def id(self) -> str:
        """The run's identity, the same over all attempts: `wandb.init(id=run.id, resume="allow")`."""
        self.restore()
        return self._opened.record.run_id

    @property
    def step(self) -> int:
        """Completed iterations over all attempts; what was computed and lost does not count."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch that the loop is in, from 0."""
        return self._position.epoch

    @property
    def batch(self) -> int:
        """Batches of this epoch's loop that are done; during an iteration, the number of the batch at hand."""
        return self._position.batch

    @property
    def finished(self) -> bool:
        """True when the run was complete before this start: the loops yield nothing, and nothing is written."""
        return self._finished

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; for people. 0 for a finished run that is only read."""
        self.restore()
        lineage = self._opened.lineage
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
                "track() comes before restore() and before the first loop: what is tracked is restored together"
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
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version checkpoints runs of one process. "
                "Use one process, or keep your framework's own checkpoints for now"
            )
        self._signals.install()
        if os.environ.get(ENV_CONTROL):
            self._page = ProgressPage(Path(os.environ[ENV_CONTROL]))
            self._page.entered(Phase.RESTORING)
        try:
            return self._open_and_load()
        except BaseException as error:
            self._broken = f"restore() failed ({type(error).__name__}); the tracked objects may hold undefined values"
            raise

    def _open_and_load(self) -> bool:
        self._store = open_store(self._url, options=self._store_options)
        self._environment = describe_environment()
        self._script_hyperparameters = hyperparameters(self._tracker.optimizers())
        fresh = wants_fresh(self._fresh, os.environ)
        claim = open_run(
            self._store,
            is_default_url=self._is_default_url,
            identity=identity_digest(self._tracker.describe(), self._config),
            fresh=fresh,
            extend=self._extend,
            clock=self._clock,
            tokens=self._tokens,
            warn=self._warn,
        )
        self._claim = claim
        self._finished = claim.lineage is None
        if claim.lineage is not None:
            self._start_saver(claim, claim.lineage)
        restored = self._load(claim)
        if self._seed is None:
            self._seed = torch.initial_seed() & (2**63 - 1)
        self._gate = StepGate(self._tracker.optimizers(), self._saver.release if self._saver else lambda: None)
        self._pacing = Pacing(self._triggers, self._bound, self._rate(claim), self._clock)
        self._pacing.begin(self._step)
        self._announce(claim, restored)
        self._restored = restored is not None
        return self._restored

    def _start_saver(self, claim: Claim, lineage: Any) -> None:
        attempt = lineage.head.attempt
        if self._page is not None:
            self._page.claimed(attempt)
        self._ledger = Ledger(self._opened_store, attempt=attempt, node="0", clock=self._clock)
        self._metrics = Metrics(self._ledger, self._loggers, self._clock)
        self._saver = Saver(
            self._opened_store,
            lineage,
            options=self._saver_options,
            open_home=self._open_home,
            clock=self._clock,
            tokens=self._tokens,
            sink=self._ledger,
            before_commit=self._flush_record,
            committed=lambda ref: self._page.committed(ref.step) if self._page is not None else None,
        )

    def _flush_record(self) -> None:
        """Before a commit: what was logged up to a step is durable once that step is."""
        if self._metrics is not None and self._ledger is not None:
            self._metrics.settle(wait=True)
            self._ledger.flush()

    def _load(self, claim: Claim) -> CheckpointReader | None:
        head = claim.head
        if head is None:
            return None
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="holdfast-read") as pool:

            def load(reader: CheckpointReader) -> tuple[CheckpointReader, Loaded]:
                return reader, load_checkpoint(reader, self._tracker, pool, strict=self._strict)

            found = restore_newest(
                self._opened_store, head, self._open_home, load, fell_back=lambda fallback: self._fell_back(fallback)
            )
        if found is None:
            return None
        reader, loaded = found
        self._adopt(reader, loaded)
        return reader

    def _adopt(self, reader: CheckpointReader, loaded: Loaded) -> None:
        for line in loaded.skipped:
            self._warn(f"strict=False left this out: {line}")
        own = loaded.own
        self._step = int(own["step"])
        self._position = Position.from_json(own["position"])
        self._loader_state = own["loader"]
        if self._seed is not None and self._seed != own["seed"]:
            self._warn(f"seed={self._seed} is ignored: this run's data order was begun with seed {own['seed']}")
        self._seed = int(own["seed"])
        self._compare_settings(reader.root.metadata)
        if self._saver is not None:
            self._saver.known.add(reader.ref.name, reader.part, home=reader.ref.home)
            self._saver.roots.remember(reader.root)
        for line in restore_rng(own["rng"]):
            self._warn(line)

    def _compare_settings(self, saved: Mapping[str, Any]) -> None:
        """Show what changed since the checkpoint, and apply the rule for hyperparameters."""
        lines = differences(saved.get("environment", {}), self._environment)
        lines += differences({"config": saved.get("config")}, {"config": self._config})
        changed = differences(saved.get("script_hyperparameters", {}), self._script_hyperparameters)
        for line in lines:
            self._say(f"changed since the checkpoint: {line}")
        if not changed:
            return
        if self._hyperparameters == "script":
            self._apply_script_hyperparameters(saved.get("script_hyperparameters", {}))
            rule = "applied (hyperparameters='script'); a tracked LR scheduler may set the learning rate again"
        else:
            rule = "NOT applied: the checkpoint's settings are in force. Pass hyperparameters='script' to apply them"
            self._script_hyperparameters = dict(saved.get("script_hyperparameters", {}))
        for line in changed:
            self._say(f"the script changed {line}: {rule}")

    def _apply_script_hyperparameters(self, saved: Mapping[str, Any]) -> None:
        for name, optimizer in self._tracker.optimizers().items():
            before_groups = saved.get(name, [])
            for group, before, now in zip(
                optimizer.param_groups, before_groups, self._script_hyperparameters[name], strict=False
            ):
                for key, value in now.items():
                    if differences(before.get(key), value):
                        group[key] = value

    def _fell_back(self, fallback: Fallback) -> None:
        self._warn(
            f"the checkpoint of step {fallback.checkpoint.step} does not verify and is passed over for an older one: {fallback.reason}"
        )
        self._emit("restore.fell_back", checkpoint=fallback.checkpoint.name, reason=fallback.reason)

    def _rate(self, claim: Claim) -> PreemptionRate:
        """What this run itself has seen: every attempt but this one ended before its time."""
        head = claim.head
        if head is None or claim.record.created_unix_s == 0:
            return PreemptionRate()
        exposure_s = max(0.0, self._clock.unix_s() - claim.record.created_unix_s)
        return PreemptionRate().observed(max(0, head.attempt - 1), exposure_s)

    def _announce(self, claim: Claim, restored: CheckpointReader | None) -> None:
        if claim.lineage is None:
            self._say(
                f"{self._url}: this run is finished at step {self._step}; nothing is trained. Go on with extend=True"
            )
            self._enter(Phase.FINISHED)
            return
        previous = int(os.environ.get(ENV_PREVIOUS_STEP, "-1"))
        self._emit(
            "attempt.started",
            step=self._step,
            epoch=self.epoch,
            previous_step=previous,
            restored=restored.ref.name if restored else None,
            environment=self._environment,
        )
        where = f"resumes at step {self._step} (epoch {self.epoch}, batch {self.batch})" if restored else "starts"
        lost = f"; {previous - self._step} steps are computed again" if previous > self._step else ""
        self._say(f"{self._url}: attempt {claim.lineage.head.attempt} {where}{lost}")
        if self._page is not None:
            self._page.restored(self._step)
        self._enter(Phase.TRAINING)

    # ---- loops

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left, starting in the one that the checkpoint was made in."""
        self.restore()
        if self._finished:
            return
        self._goal_epochs = total
        while self._position.epoch < total:
            self._phase = -1
            yield self._position.epoch
            self._position = self._position.next_epoch()
            self._phase = None
            self._boundary(epoch_ended=True)

    def batches(self, loader: Iterable[Batch], *, epochs: int | None = None) -> Iterator[Batch]:
        """The batches that are left of this epoch, starting at the exact next one; with `epochs`, of all epochs in one loop.

        Inside `epochs()`, several loops over batches may follow each other in one epoch; those that are done are skipped.
        """
        if epochs is not None:
            for _ in self.epochs(epochs):
                yield from self._iterate(loader, nested=False)
        elif self._phase is None:
            for _ in self.epochs(1):
                yield from self._iterate(loader, nested=False)
        else:
            yield from self._iterate(loader, nested=True)

    def _iterate(self, loader: Iterable[Batch], *, nested: bool) -> Iterator[Batch]:
        self._phase = (self._phase if self._phase is not None else -1) + 1
        if self._phase < self._position.phase:
            return
        if self._phase > self._position.phase:
            self._position = self._position.next_phase()
        resumable = self._current = self._resumable(loader)
        # What is only held in memory was for leaving during the code between two loops.
        self._drop_held()
        for batch in resumable.iterate(self._position.epoch, self._position.batch):
            self._in_body = True
            if self._gate is not None:
                self._gate.begin_iteration()
            try:
                yield batch
            except GeneratorExit:
                self._broken_off()
                raise
            self._in_body = False
            self._position = self._position.after_batch()
            self._step += 1
            self._boundary()
        if nested:
            self._hold()

    def _resumable(self, loader: Iterable[Any]) -> ResumableLoader:
        known = self._loaders.get(id(loader))
        if known is None:
            made = ResumableLoader(loader, seed=self._seed or 0, warn=self._warn)
            known = self._loaders[id(loader)] = (loader, made)
            if self._loader_state is not None:
                made.load_state(self._loader_state)
                self._loader_state = None
        self._batch_size = getattr(loader, "batch_size", None)
        return known[1]

    def _broken_off(self) -> None:
        """The user left the loop with `break`. The batch counts as consumed if an optimizer stepped on it."""
        if self._closed or self._gate is None or not self._in_body:
            return
        self._in_body = False
        if self._gate.any_stepped:
            self._position = self._position.after_batch()
            self._step += 1

    # ---- boundaries and saves

    def _boundary(self, *, epoch_ended: bool = False) -> None:
        saver, gate, pacing = self._saver, self._gate, self._pacing
        if saver is None or gate is None or pacing is None:
            return
        if self._page is not None:
            self._page.stepped(self._step)
        saver.check(self._warn)
        reason = pacing.boundary(self._step, epoch_ended=epoch_ended, busy=saver.busy)
        if reason is None and (self._asked is not None or self._deferred_since is not None):
            reason = "asked for"
        leaving = self._signals.leaving
        if leaving is not None:
            reason = "leaving"
        if reason is not None and self._may_copy(gate):
            if leaving is not None:
                self._leave(leaving)
            self._save(reason)

    def _may_copy(self, gate: StepGate) -> bool:
        """False in a region where the state must not be copied, and in the middle of a gradient accumulation."""
        name = gate.accumulating() if not self._mutating else None
        if not self._mutating and name is None:
            self._deferred_since = None
            return True
        if self._deferred_since is None:
            self._deferred_since = self._step
        elif self._step - self._deferred_since == _DEFERRAL_WARNING:
            self._warn(
                f"a save has been deferred for {_DEFERRAL_WARNING} steps, "
                + (
                    f"because {name!r} keeps collecting gradients and never steps"
                    if name
                    else "because of run.mutating()"
                )
            )
        return False

    def save(self) -> SaveHandle:
        """Save at the next step boundary: inside an iteration, when it ends; between loops, now. Returns a handle at once.

        A failure shows when `handle.wait()` is called, and as a warning at a later boundary; see `max_unsaved`.
        """
        self.restore()
        if self._saver is None:
            raise UsageError(f"{self._url}: the run is finished and only read; pass extend=True to go on")
        if not self._in_body:
            return self._save("asked for")
        if self._asked is None:
            self._asked = SaveHandle(self._step + 1)
        return self._asked

    def _request(self, reason: str, *, finish: bool = False) -> SaveRequest:
        return SaveRequest(
            flat=self._flatten(),
            step=self._step,
            epoch=self.epoch,
            metadata=self._metadata(),
            reason=reason,
            deferrable=self._deferrable(),
            finish=finish,
        )

    def _save(self, reason: str, *, finish: bool = False) -> SaveHandle:
        saver, pacing = self._saver, self._pacing
        if saver is None or pacing is None:
            raise UsageError("the run is not open")
        asked, self._asked = self._asked, None
        self._deferred_since = None
        handle = saver.save(self._request(reason, finish=finish), asked)
        pacing.saved(self._step, saver.stall_s_of_last)
        pacing.decide(saver.durable_s_of_last, self._expected_runtime_s(pacing))
        return handle

    def _expected_runtime_s(self, pacing: Pacing) -> float | None:
        """From the pace of this attempt, when the loop's length is known."""
        length = self._current.batches_per_epoch if self._current is not None else None
        if not length or not self._goal_epochs or self._step == 0:
            return None
        return pacing.elapsed_s * self._goal_epochs * length / self._step

    def _flatten(self) -> FlatTree:
        own = {
            "step": self._step,
            "position": self._position.to_json(),
            "seed": self._seed,
            "loader": self._current.state() if self._current is not None and self._position.batch else None,
            "rng": capture_rng(),
        }
        return flatten({"tracked": self._tracker.state(), "holdfast": own})

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

    def _metadata(self) -> dict[str, Any]:
        rates = {
            name: [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
            for name, optimizer in self._tracker.optimizers().items()
        }
        dtypes = sorted({str(p.dtype) for module in self._tracker.modules().values() for p in module.parameters()})
        return {
            "step": self._step,
            "epoch": self.epoch,
            "batch": self.batch,
            "learning_rates": rates,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "precision": dtypes,
            "world_size": 1,
            "config": self._config,
            "script_hyperparameters": self._script_hyperparameters,
            "environment": self._environment,
            "tracked": self._tracker.names(),
        }

    def _hold(self) -> None:
        """At the end of a loop over batches: keep the state in memory, in case the code that follows is interrupted."""
        if self._saver is not None and self._pacing is not None and self._gate is not None:
            if self._pacing.unsaved_steps(self._step) > 0 and self._may_copy(self._gate):
                self._saver.hold(self._request("interrupted between loops"))
            else:
                self._deferred_since = None

    def _drop_held(self) -> None:
        if self._saver is not None:
            self._saver.drop_held()

    # ---- regions

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation. Interrupted, it is done again after resume, never skipped.

        Between loops over batches, a SIGTERM ends it at once and the state from before is saved. Inside an iteration it is run
        to its end first, since the iteration is not complete.
        """
        self.restore()
        self._interruptible = not self._in_body and self._saver is not None
        self._enter(Phase.EVALUATING)
        try:
            if self._signals.leaving is not None:
                self._abandon(self._signals.leaving)
            yield
        finally:
            self._interruptible = False
            self._enter(Phase.TRAINING)

    @contextmanager
    def mutating(self) -> Iterator[None]:
        """A region in which the tracked state must not be copied: EMA weights swapped in, the ascent step of SAM."""
        if self._saver is not None:
            self._saver.release()
        self._mutating += 1
        try:
            yield
        finally:
            self._mutating -= 1

    def _abandon(self, code: int) -> None:
        """From the signal handler: inside an interruptible region, leave at once with what was held."""
        if self._interruptible and self._saver is not None:
            self._interruptible = False
            self._saver.commit_held()
            self._depart(code)

    # ---- record

    def log(self, **figures: Any) -> None:
        """Record figures of this step (numbers, or tensors of one element). Never waits for the GPU."""
        self.restore()
        if self._metrics is not None:
            self._metrics.log(self._step, self.epoch, figures)

    def remember(self, name: str, make: Callable[[], str]) -> str:
        """A text that is made once and is the same in all attempts: an experiment id that a tracking server hands out."""
        self.restore()
        return remember(self._opened_store, name, make)

    def _emit(self, name: str, **fields: Any) -> None:
        if self._ledger is not None:
            self._ledger.emit(Event(name, self._clock.unix_s(), fields))

    def _say(self, message: str) -> None:
        print(f"holdfast: {message}", file=sys.stderr, flush=True)

    def _warn(self, message: str) -> None:
        self._emit("warning", message=message)
        warnings.warn(message, HoldfastWarning, stacklevel=4)

    def _enter(self, phase: Phase) -> None:
        if self._page is not None:
            self._page.entered(phase)

    # ---- leaving

    def _leave(self, code: int) -> None:
        """At a boundary, told to go: save what is new, wait until it is durable, leave."""
        if self._pacing is not None and (self._pacing.unsaved_steps(self._step) > 0 or self._asked is not None):
            self._save("leaving")
        self._depart(code)

    def _depart(self, code: int) -> None:
        self._enter(Phase.LEAVING)
        saver = self._saver
        saved = saver is not None and saver.drain(_LEAVE_WITHIN_S)
        self._emit("attempt.leaving", step=self._step, code=code, drained=saved)
        if saver is not None:
            saver.check(self._warn)
        self._say(f"leaving at step {self._step} with exit code {code}; start the same command again to go on")
        raise Preempted(code)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaving normally makes the last checkpoint and marks the run finished. An exception makes none: the step is incomplete."""
        try:
            if kind is None and self._saver is not None and self._broken is None:
                self._finish(self._saver)
            elif error is not None and not isinstance(error, Preempted | Fenced):
                self._emit("attempt.failed", step=self._step, error=f"{type(error).__name__}: {error}")
        finally:
            self.close(wait=not isinstance(error, KeyboardInterrupt | Fenced))
        if isinstance(error, Fenced) and ENV_CONTROL in os.environ:
            self._say(str(error))
            raise SystemExit(EXIT_FENCED) from error

    def _finish(self, saver: Saver) -> None:
        if self._signals.leaving is not None:
            self._leave(self._signals.leaving)
        self._in_body = False
        ref = self._save("finished", finish=True).wait()
        self._enter(Phase.FINISHED)
        self._say(
            f"finished at step {ref.step} after {format_duration(self._pacing.elapsed_s if self._pacing else 0.0)}"
        )
        self._emit("attempt.finished", step=ref.step)

    def close(self, *, wait: bool = True) -> None:
        """Let go of everything. With `wait`, saves that are under way are finished first. Marks nothing as finished."""
        if self._closed:
            return
        self._closed = True
        if self._gate is not None:
            self._gate.remove()
        if self._saver is not None:
            self._saver.close(timeout_s=_LEAVE_WITHIN_S if wait else 0.0)
        if self._metrics is not None and wait:
            self._metrics.settle(wait=True)
            self._metrics.tell()
        if self._ledger is not None:
            self._ledger.close()
        if self._page is not None:
            self._page.close()
            self._page = None
        self._signals.remove()

    # ---- internals

    @property
    def _opened(self) -> Claim:
        if self._claim is None:
            raise UsageError("the run has not been opened; call restore() or start a loop")
        return self._claim

    @property
    def _opened_store(self) -> Store:
        if self._store is None:
            raise UsageError("the run has not been opened; call restore() or start a loop")
        return self._store

    def _open_home(self, url: str) -> Store:
        """The store of another run that a fork refers to."""
        known = self._homes.get(url)
        if known is None:
            known = self._homes[url] = open_store(url, options=self._store_options)
        return known

    def __repr__(self) -> str:
        head: Head | None = self._claim.head if self._claim else None
        size = format_bytes(head.checkpoints[-1].total_bytes) if head and head.checkpoints else "no checkpoint"
        return f"<Run {self._url} step {self._step}, {size}>"
