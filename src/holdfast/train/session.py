"""An opened run: the claim, the checkpoint that it began with, and what saves under it.

open: claim → restore → saver, gate, pacing → announce          capture: live state → save request
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.handover import Inherited, Legacy
from holdfast.checkpoint.read import CheckpointReader
from holdfast.checkpoint.runs.base import Adopted
from holdfast.checkpoint.saver import Saver, SaveRequest, SaverOptions
from holdfast.checkpoint.tier import LocalTier, Tier
from holdfast.checkpoint.tree import Leaf, flatten
from holdfast.core.clock import Clock
from holdfast.core.contract import ENV_PREVIOUS_STEP, ENV_STAGED, Phase
from holdfast.core.errors import HoldfastError
from holdfast.core.ids import TokenSource
from holdfast.policy.interval import LostShare, LostTime, Trigger
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.train.base import Base, share_base, take_base, tell_of_no_use
from holdfast.train.boundary import StepGate
from holdfast.train.devices import Device, describe_devices, device_changes, this_device
from holdfast.train.history import History
from holdfast.train.metadata import describe_environment, describe_state, hidden
from holdfast.train.opening import Claim, identity_digest, open_run, wants_fresh
from holdfast.train.pacing import Pacing
from holdfast.train.place import Place
from holdfast.train.ranks.joining import claim_together, same_for_all
from holdfast.train.ranks.sharing import Sharer
from holdfast.train.ranks.together import Together
from holdfast.train.record import Record
from holdfast.train.restoring import Loaded
from holdfast.train.resuming import Resuming
from holdfast.train.saves import LAST_SAVES, Saves
from holdfast.train.settings import Settings
from holdfast.train.tracked import Tracker

__all__ = ["Session", "SessionOptions"]

_IDLE_CLOSE_S = 5.0
"""More than a saver without work takes to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What the user chose. `is_default_url`: nobody named the URL, so it must not hold another experiment."""

    url: str
    is_default_url: bool
    fresh: bool
    extend: bool
    strict: bool
    triggers: tuple[Trigger, ...]
    bound: LostTime | LostShare | None
    saver: SaverOptions
    base: Base | None = None
    local: LocalTier | None = None


class Session:
    """Owned by the run, and by the loop's thread. `claim` is None until `open`; `saves` stays None for a finished run."""

    def __init__(
        self,
        options: SessionOptions,
        *,
        tracker: Tracker,
        place: Place,
        settings: Settings,
        record: Record,
        open_store: Callable[[str], Store],
        legacy: Callable[[str, Head, int, Callable[[], dict[str, bytes]]], Legacy | None],
        inherited: Callable[[], list[Inherited]],
        forget_inherited: Callable[[], None],
        clock: Clock,
        tokens: TokenSource,
    ) -> None:
        self._options, self._tracker, self._place, self._settings = options, tracker, place, settings
        self._record, self._open_store, self._clock, self._tokens = record, open_store, clock, tokens
        self._legacy, self._find_inherited, self._forget_inherited = legacy, inherited, forget_inherited
        self._devices: list[Device] = []
        self._stores: dict[str, Store] = {}
        self._saver: Saver | None = None
        self._tier: Tier | None = None
        self._first_save: Callable[[], None] = lambda: None
        self.claim: Claim | None = None
        self.restored = False
        self._is_imported = False
        self._together: Together | None = None
        self._sharer: Sharer | None = None
        self._history = History()
        self._pacing: Pacing | None = None
        self.gate = StepGate({}, lambda: None)
        self.saves: Saves | None = None

    @property
    def store(self) -> Store:
        """The run's own."""
        return self.home(self._options.url)

    def home(self, url: str) -> Store:
        """The store of this run, or of another one that a fork refers to."""
        known = self._stores.get(url)
        if known is None:
            known = self._stores[url] = self._open_store(url)
        return known

    def close(self, timeout_s: float) -> None:
        """Finish saves that are under way within `timeout_s`."""
        if self.saves is not None:
            self.saves.close(timeout_s)
        elif self._saver is not None:
            # Nothing has been saved, so this takes no time; and the next Run of this process needs the lock on the disk.
            self._saver.close(timeout_s=max(timeout_s, _IDLE_CLOSE_S))
        elif self._tier is not None:
            self._tier.close()

    def let_go(self) -> None:
        """Close the stores: the last thing, when the record has been written too."""
        while self._stores:
            self._stores.popitem()[1].close()

    # ---- opening

    def open(self, together: Together | None = None) -> None:
        """Claim the run and restore; with the other ranks, if there are any. Raises what `Run.restore` says."""
        options, self._together = self._options, together
        self._settings.observe(self._tracker.optimizers(), describe_environment())
        if together is None:
            claim, self._devices = self._claim(), [this_device()]
        else:
            self._warn_of_one_rank(together)
            self._sharer = Sharer(together, self._tracker)
            claim, self._devices = claim_together(together, self._claim, this_device())
        self.claim = claim
        if not claim.finished:
            self._tier = self._hold_tier(claim) if together is None else None
            self._saver = self._start_saver(claim)
            if options.base is not None:
                # Before the restore, which may hand the lineage over to the saver's threads.
                claim = self.claim = self._take_base(claim, options.base, self._saver)
        else:
            self._clear_tier(claim)
        ahead = os.environ.get(ENV_STAGED)
        with Resuming(
            self.store, self.home, self._tracker, self._place, self._record, self._together, self._tier, self._saver,
            inherited=[] if claim.finished else self._find_inherited(), ahead=LocalStore(ahead) if ahead else None,
            strict=self._options.strict, clock=self._clock, tokens=self._tokens,
        ) as resuming:  # fmt: skip
            claim = self.claim = resuming.commit_inherited(claim)
            restored = self._adopted(claim, resuming.load(claim))
        # All ranks have read by now: they have agreed on what is restored.
        self._forget_inherited()
        if self._place.seed is None:
            self._place.seed = torch.initial_seed() & (2**63 - 1)
        if together is not None:
            self._place.seed = same_for_all(together, "seed", self._place.seed)
        if self._saver is not None:
            self.saves = self._start_saves(self._saver, claim)
        self.restored = restored is not None
        self._announce(claim, restored)

    def _claim(self) -> Claim:
        return open_run(
            self.store,
            is_default_url=self._options.is_default_url,
            identity=identity_digest(self._tracker.describe(), self._settings.config),
            fresh=wants_fresh(self._options.fresh, os.environ),
            extend=self._options.extend,
            clock=self._clock,
            tokens=self._tokens,
            warn=self._record.warn,
        )

    def _warn_of_one_rank(self, together: Together) -> None:
        if self._options.local is not None and together.coordinates:
            self._record.warn("local=… works with one rank only so far: checkpoints go straight to the run's URL")

    def _take_base(self, claim: Claim, base: Base, saver: Saver) -> Claim:
        """The claim with the head as it is then."""
        record, lineage = self._record, claim.lineage

        def take() -> Adopted | None:
            assert lineage is not None
            return take_base(base, self.store, lineage, saver, open_home=self.home, tokens=self._tokens, record=record)

        if self._together is None:
            adopted = take()
        else:
            adopted = share_base(self._together, take, base, saver.known, open_home=self.home, warn=record.warn)
        if lineage is None:
            return claim
        if adopted is not None:
            self._first_save = partial(tell_of_no_use, adopted, base, lineage, record)
        return replace(claim, head=lineage.head)

    def _start_saver(self, claim: Claim) -> Saver:
        lineage, head = claim.lineage, claim.head
        assert head is not None
        return Saver(
            self.store,
            lineage,
            options=self._options.saver,
            open_home=self.home,
            clock=self._clock,
            tokens=self._tokens,
            sink=self._record.open(self.store, head.attempt, head.generation),
            before_commit=self._record.flush,
            committed=self._committed,
            figure=self._record.watch(self._options.saver.keep.best),
            unsent=self._record.unsent,
            tier=self._tier,
            legacy=self._legacy(self.store.url, head, self._place.rank, self._record.unsent),
            party=self._together,
        )

    def _hold_tier(self, claim: Claim) -> Tier | None:
        """The machine's disk, if there is one to use. The run goes on without it."""
        if self._options.local is None:
            return None
        tier = Tier(self._options.local, claim.record.run_id)
        try:
            if tier.hold():
                return tier
            self._record.warn(
                f"{tier.folder} is in use by another process (or another Run) of this run: this one goes on without it"
            )
        except OSError as error:
            self._record.warn(f"the local disk cannot be used, and the run goes on without it: {error}")
        return None

    def _clear_tier(self, claim: Claim) -> None:
        """Nothing on the disk continues a run that is finished: what an attempt could not clear away any more goes now."""
        if self._options.local is None:
            return
        tier = Tier(self._options.local, claim.record.run_id)
        with suppress(OSError, HoldfastError):
            if tier.folder.is_dir() and tier.hold():
                tier.keep_only(())
        tier.close()

    def _committed(self, ref: CheckpointRef) -> None:
        """In the thread that has committed."""
        first_save, self._first_save = self._first_save, lambda: None
        first_save()
        self._record.committed(ref.step)

    def _start_saves(self, saver: Saver, claim: Claim) -> Saves:
        self.gate = StepGate(self._tracker.optimizers(), saver.release)
        history = self._history
        pacing = self._pacing = Pacing(
            self._options.triggers, self._options.bound, history.rate, self._clock, save_cost_s=history.save_cost_s
        )
        pacing.begin(self._place.step)
        if self._together is not None and not self._together.coordinates:
            pacing.follow()
        return Saves(saver, self.gate, pacing, self._place, self.capture, self._record, self._together)

    def _adopted(self, claim: Claim, found: tuple[CheckpointReader, Loaded] | None) -> CheckpointReader | None:
        """What was read into the tracked objects is where the run is now."""
        if found is None or claim.head is None:
            return None
        reader, loaded = found
        for line in loaded.skipped:
            self._record.warn(f"strict=False left this out: {line}")
        asked, place = self._place.seed, self._place
        for line in place.resume(loaded.own):
            self._record.warn(line)
        if asked is not None and asked != place.seed:
            self._record.warn(f"seed={asked} is ignored: this run's data order was begun with seed {place.seed}")
        self._is_imported = loaded.imported
        self._history = History.after(reader.root.metadata, claim.record.run_id)
        if loaded.imported:
            rest = f"; {', '.join(loaded.untouched)} as the script made them" if loaded.untouched else ""
            self._record.say(f"{self._options.url}: begins with imported weights{rest}")
        else:
            self._settings.reconcile(reader.root.metadata, self._tracker.optimizers(), self._record.say)
            now = describe_state(self._tracker.optimizers(), self._tracker.modules())
            for line in device_changes(reader.root.metadata, describe_devices(self._devices), now["precision"]):
                self._record.say(line)
        if self._saver is not None and any(ref.name == reader.ref.name for ref in claim.head.checkpoints):
            self._saver.known.add(
                reader.ref.name, reader.part(place.rank % reader.root.world_size), home=reader.ref.home
            )
            self._saver.roots.remember(reader.root)
        return reader

    def _announce(self, claim: Claim, restored: CheckpointReader | None) -> None:
        step, position, record = self._place.step, self._place.position, self._record
        if claim.finished:
            record.say(
                f"{self._options.url}: this run is finished at step {step}; nothing is trained. Go on with extend=True"
            )
            record.entered(Phase.FINISHED)
            return
        previous = int(os.environ.get(ENV_PREVIOUS_STEP) or -1)
        record.restored(step)
        record.emit(
            "attempt.started",
            **record.stopwatch.totals(),
            epoch=position.epoch,
            previous_step=previous,
            restored=restored.ref.name if restored else None,
            environment=self._settings.environment,
        )
        resumes = restored is not None and not self._is_imported
        where = f"resumes at step {step} (epoch {position.epoch}, batch {position.batch})" if resumes else "starts"
        lost = f"; {_steps(previous - step)} computed again" if previous > step else ""
        attempt = claim.head.attempt if claim.head is not None else 0
        ranks = f" on {place.world_size} ranks" if (place := self._place).world_size > 1 else ""
        record.say(f"{self._options.url}: attempt {attempt} {where}{ranks}{lost}")
        record.entered(Phase.TRAINING)

    # ---- saving

    def capture(self, reason: str, finish: bool) -> SaveRequest:
        """The live state, as of now."""
        place, tracker = self._place, self._tracker
        ranks = (0,) if self._together is None else self._together.survivors
        own = {**place.state(len(ranks)), "parameters": tracker.parameters()}
        metadata = {
            "step": place.step,
            "epoch": place.position.epoch,
            "batch": place.position.batch,
            **describe_state(tracker.optimizers(), tracker.modules()),
            "batch_size": place.batch_size,
            "seed": place.seed,
            "world_size": len(ranks),
            **self._told_history(leaves=reason in LAST_SAVES, finishes=finish),
            "config": hidden(self._settings.config),
            "script_hyperparameters": self._settings.script,
            "environment": self._settings.environment,
            "devices": describe_devices(self._devices),
            "tracked": tracker.names(),
        }
        tree = {"tracked": tracker.state(), "holdfast": own}
        return SaveRequest(
            flat=flatten(tree) if self._sharer is None else self._sharer.take(tree, place.step, ranks),
            step=place.step,
            epoch=place.position.epoch,
            metadata=metadata,
            reason=reason,
            deferrable=self._deferrable(),
            finish=finish,
            ranks=ranks,
        )

    def _told_history(self, *, leaves: bool, finishes: bool) -> dict[str, Any]:
        run_id, pacing = None if self.claim is None else self.claim.record.run_id, self._pacing
        elapsed_s, cost_s = (0.0, None) if pacing is None else (pacing.elapsed_s, pacing.meter.measured_s)
        return self._history.written(run_id, elapsed_s, cost_s, leaves=leaves, finishes=finishes)

    def _deferrable(self) -> Callable[[Leaf], bool] | None:
        """On CUDA, parameters and their state are written by optimizers only: their copy may overlap forward and backward."""
        if not torch.cuda.is_available():
            return None
        owned: set[int] = set()
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


def _steps(count: int) -> str:
    return "1 step is" if count == 1 else f"{count} steps are"
