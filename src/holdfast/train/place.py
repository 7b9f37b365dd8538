"""Where the script is in its loops: epoch, loop within the epoch, batch, and how it gets back there after a resume.

The script runs from its top again after a resume, so code before the place where it was interrupted runs twice and may draw random
numbers. The generators are therefore set to what the checkpoint holds each time the script comes closer to its old place: at
restore, when the epoch begins, and when the loop over batches goes on.

With more than one rank every one of them is at the same place of one global order (data/global_batch.py), and a place is a number
of samples of it. So a run goes on at the exact next sample in a world of another size, except in the middle of an epoch over a
loader of which each rank reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from holdfast.core.errors import SaveError, UsageError
from holdfast.data.global_batch import Micro
from holdfast.data.position import Position
from holdfast.train.loader import ResumableLoader
from holdfast.train.rng import capture_rng, restore_rng, seed_rng

__all__ = ["Place"]

_SAME_BATCHES = ("kind", "type", "samples", "batch_size", "batches_per_step", "sampler")
"""What decides which samples batch k of an epoch holds."""
_SAME_ORDER = ("kind", "type", "samples", "sampler")
"""What decides which sample is at place k of it, where the order does not depend on the size of batches."""
_STATELESS = ("dataloader", "iterable")
"""Loaders without a state of their own: the position alone says where they are, even while a batch is being fetched."""


class Place:
    """Owned by the loop's thread. `warn` is told what a resume costs, `say` what is no more than worth knowing; `strict` refuses to
    continue an epoch with other batches."""

    def __init__(
        self,
        *,
        seed: int | None,
        strict: bool,
        warn: Callable[[str], None],
        say: Callable[[str], None] = lambda _: None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.position = Position()
        self.step = 0
        self.seed = seed
        self.goal_epochs: int | None = None
        self.in_batch = False
        self.cut = False
        self.current: ResumableLoader | None = None
        self.batch_size: int | None = None
        self._strict, self._warn, self._tell = strict, warn, say
        self._told: set[str] = set()
        self._epochs: object | None = None
        self._loop: object | None = None
        self._phase = -1
        self._passes = 0
        self._loaders: dict[int, tuple[Any, ResumableLoader, int]] = {}
        self._nothing_left = False
        self._resumed: dict[str, Any] | None = None
        self._world_before = world_size
        self._steps_before: dict[int, int] = {}
        self._step_samples: dict[int, int] = {}
        """How many samples a step has, in each loop of an epoch: as the checkpoint has it, and as it is."""

    def joins(self, rank: int, world_size: int) -> None:
        """Say which rank this is, of how many: before `resume` and the first loop."""
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}: a rank is a number from 0 to {world_size - 1}")
        if self._passes:
            raise UsageError("the ranks of a job are known before its first loop")
        self.rank, self.world_size = rank, world_size
        self._world_before = world_size

    # ---- state

    def state(self, world_size: int | None = None) -> dict[str, Any]:
        """What a checkpoint remembers; one made by `world_size` ranks, if some of all are gone. Raises SaveError when nobody else
        knows where the data of those is."""
        loader, at = self.current if self.position.batch else None, self.position
        if world_size is None:
            world_size = self.world_size
        elif world_size != self.world_size and loader is not None and loader.is_own:
            raise SaveError("each rank reads data of its own, and only those that are gone knew where theirs is")
        batches = None if loader is None else {
            **loader.describe(), "own": loader.is_own, "over": loader.is_over(at.batch, at.samples),
        }  # fmt: skip
        return {
            "step": self.step,
            "position": at.to_json(),
            "seed": self.seed,
            "world_size": world_size,
            "step_samples": {str(phase): samples for phase, samples in self._step_samples.items()},
            "loader": None if loader is None else loader.state(),
            "batches": batches,
            "rng": capture_rng(),
        }

    def resume(self, state: dict[str, Any]) -> list[str]:
        """Begin where `state` was: this rank's own where the world has the same size, else any rank's. Returns lines about what
        could not be restored on this hardware.

        The state of an imported checkpoint has no position: the loop begins at its start, its random generators and seed as the
        script has set them, and only the steps are counted on.
        """
        self.step = int(state.get("step", 0))
        if "position" not in state:
            return []
        self.position = _position_in(state)
        self.seed = int(state["seed"])
        self._world_before = int(state.get("world_size", 1))
        self._steps_before = {int(phase): samples for phase, samples in state.get("step_samples", {}).items()}
        self._resumed = state
        return self._restore_generators(state)

    @property
    def _moved(self) -> bool:
        """The checkpoint was made by another number of ranks."""
        return self._world_before != self.world_size

    def _restore_generators(self, state: dict[str, Any]) -> list[str]:
        if not self._moved:
            return restore_rng(state["rng"])
        seed_rng(int(state["seed"]), world_size=self.world_size, rank=self.rank, step=int(state["step"]))
        return []

    def _set_generators(self, *, arrived: bool) -> None:
        if self._resumed is not None:
            self._restore_generators(self._resumed)
            if arrived:
                self._resumed = None

    # ---- epochs

    @property
    def in_iteration(self) -> bool:
        """Inside an iteration of a loop over batches or over epochs, which is complete only at its end."""
        return self.in_batch or self._epochs is not None

    @property
    def has_looped(self) -> bool:
        """Whether a loop has been begun in this process."""
        return self.goal_epochs is not None

    def expected_steps(self) -> int | None:
        """How many steps the run will have in all, where the loop's length is known."""
        length = self.current.batches_per_epoch if self.current is not None else None
        return length * self.goal_epochs if length and self.goal_epochs else None

    def enter_epochs(self, total: int) -> object:
        """Returns a token for `leave_epochs`."""
        if type(total) is not int or total < 0:
            raise UsageError(f"the number of epochs is an integer, not {total!r}")
        if self._epochs is not None:
            raise UsageError(
                "a loop over epochs inside another one. Inside run.epochs(), loop over run.batches(loader) without epochs="
            )
        self.goal_epochs = total
        self._epochs = object()
        return self._epochs

    def leave_epochs(self, token: object) -> None:
        if self._epochs is token:
            self._epochs = None

    def begin_epoch(self) -> int:
        self._phase = -1
        self._set_generators(arrived=self.position.batch == 0 and self.position.phase == 0)
        return self.position.epoch

    def end_epoch(self) -> None:
        self.cut = False
        self.position = self.position.next_epoch()

    # ---- a loop over batches

    def enter_loop(
        self, loader: Iterable[Any], global_batch: int | None = None, batches_per_step: int = 1
    ) -> object | None:
        """Begin the next loop of this epoch. Returns a token for `leave_loop`, or None when this loop is done and to be skipped."""
        self.refuse_second_loop()
        self._phase += 1
        self._passes += 1
        if self._phase < self.position.phase:
            self._set_generators(arrived=self._phase == self.position.phase - 1 and self.position.batch == 0)
            return None
        if self._phase > self.position.phase:
            self.position = self.position.next_phase()
        self.cut = False
        self.current = self._resumable(loader, global_batch, batches_per_step)
        self._set_generators(arrived=True)
        self._loop = object()
        return self._loop

    def rest(self) -> Iterator[Any]:
        """The micro-batches that are left of the loop that was entered."""
        if self.current is None or self._nothing_left:
            return iter(())
        return self.current.iterate(self.position.epoch, self.position.batch, self.position.samples)

    def refuse_second_loop(self) -> None:
        if self._loop is not None:
            raise UsageError(
                "a loop over run.batches() inside another one (or one that was begun and never closed): only one loop drives the "
                "training. Iterate the second loader itself, or make one loader of both (torch.utils.data.StackDataset)"
            )

    def refuse_second_pass(self) -> None:
        if self._passes:
            raise UsageError(
                "run.batches(loader) outside run.epochs() makes one pass, and a pass was made already. For several epochs write "
                "`for epoch in run.epochs(N):` around it, or run.batches(loader, epochs=N)"
            )

    @property
    def can_stop_waiting(self) -> bool:
        """Whether the loop may be left while a batch is being fetched."""
        return self.current is not None and self.current.describe()["kind"] in _STATELESS

    @property
    def micro(self) -> Micro:
        """The micro-batch at hand. Raises UsageError outside of an iteration."""
        if self.current is None or not self.in_batch:
            raise UsageError("run.micro describes the batch at hand: ask inside the loop over run.batches()")
        return self.current.micro

    @property
    def step_samples(self) -> int | None:
        """How many samples a step of the current loop has over all ranks, where that is known."""
        return None if self.current is None else self.current.step_samples

    def micro_begins(self) -> bool:
        """A micro-batch has been handed out. True when a step begins with it."""
        begins, self.in_batch = not self.in_batch, True
        return begins

    def micro_done(self) -> bool:
        """True when the step is complete: its micro-batches have all been consumed."""
        if not self.micro.last:
            return False
        self._step_done()
        return True

    def _step_done(self) -> None:
        samples = self.micro.batch_samples
        self.in_batch = False
        self.position = self.position.after_batch(samples or 0)
        self.step += 1

    def leave_loop(self, token: object | None, *, counts: bool) -> None:
        """The loop has ended or was left. `counts`: an optimizer stepped on the batch at hand, so that it is consumed."""
        if token is None or self._loop is not token:
            return  # it was left before, by `leave_open_loop`
        self._loop = None
        if self.in_batch:
            self.cut = True
            if counts:
                self._step_done()
            self.in_batch = False

    def leave_open_loop(self, *, counts: bool) -> None:
        """A loop whose iterator somebody still holds is over when its epoch or the run is."""
        self.leave_loop(self._loop, counts=counts)

    # ---- the loader, as it was and as it is

    def _resumable(self, loader: Iterable[Any], global_batch: int | None, batches_per_step: int) -> ResumableLoader:
        epoch = self.position.epoch
        # Loaders that are made anew for every epoch must not pile up, with their workers.
        self._loaders = {key: known for key, known in self._loaders.items() if known[2] >= epoch - 1}
        known = self._loaders.get(id(loader))
        made = self._wrap(loader) if known is None else known[1]
        made.accumulate(global_batch)
        made.group(batches_per_step)
        self._loaders[id(loader)] = (loader, made, epoch)
        self.batch_size = getattr(loader, "batch_size", None)
        self._nothing_left = False
        if self._resumed is not None and self.position.batch:
            self._go_on(made, self._resumed, chosen=global_batch is not None)
        self._tell_step(made.step_samples, chosen=global_batch is not None)
        return made

    def _wrap(self, loader: Iterable[Any]) -> ResumableLoader:
        return ResumableLoader(
            loader, seed=self.seed or 0, warn=self._warn, say=self._say, rank=self.rank, world_size=self.world_size
        )

    def _go_on(self, made: ResumableLoader, state: dict[str, Any], *, chosen: bool) -> None:
        """In the middle of an epoch: is this the loader whose batches were consumed? `chosen`: the script says how large a step
        is."""
        saved, here = state.get("batches"), made.describe()
        same_steps = made.step_samples is not None and self._steps_before.get(self.position.phase) == made.step_samples
        free = (chosen or self._moved or same_steps) and not made.draws_by_batch
        changed = [] if saved is None else _changes(saved, here, _SAME_ORDER if free else _SAME_BATCHES)
        over = saved is not None and saved.get("over", self.position.batch == saved.get("batches_per_epoch"))
        if over and (changed or self._moved or here["kind"] == "dataloader"):
            # Its last batch is done, and another loader, or another number of ranks, takes over from the next epoch.
            self._nothing_left = True
            return
        if self._moved and (made.is_own or (saved is not None and saved.get("own"))):
            self._check_own(made)
            return
        self._check(changed, only_size=not made.draws_by_batch and _changes(saved or {}, here, _SAME_ORDER) == [])
        if state["loader"] is not None:
            made.load_state(state["loader"])

    def _check(self, changed: list[str], *, only_size: bool) -> None:
        """`only_size`: batches have another size and the same order."""
        if not changed:
            return
        what = ", ".join(changed)
        where = f"batch {self.position.batch} of epoch {self.position.epoch}"
        if not self._strict:
            comes = f"its next sample comes next, at {where}" if only_size else f"{where} of the new one comes next"
            self._warn(f"strict=False: the loader has changed ({what}); {comes}")
            return
        if only_size:
            raise UsageError(
                f"the loader has changed in the middle of an epoch ({what}): from {where} on, a step would take another number of "
                "samples. Pass global_batch=… to run.batches() to say how many it takes whatever the batch_size, or strict=False "
                "to go on like that (no sample is skipped or repeated)"
            )
        raise UsageError(
            f"the loader has changed in the middle of an epoch ({what}), so {where} is not the sample that comes next. Finish this "
            "epoch with the old loader and change it at its end, pass strict=False to go on at that batch of the new one (samples "
            "are then repeated or skipped), or fresh=True to start over"
        )

    def _check_own(self, made: ResumableLoader) -> None:
        ranks = f"{self._world_before} → {self.world_size} ranks"
        where = f"batch {self.position.batch} of epoch {self.position.epoch}"
        if not self._strict:
            self._warn(f"strict=False: {ranks}, and each reads its own; {where} of what each reads now comes next")
            return
        raise UsageError(
            f"{ranks} in the middle of an epoch, and each rank reads its own part of this {made.describe()['kind']}, so {where} is "
            f"not the sample that comes next. Go on with {self._world_before} until the epoch ends, use a DataLoader over a map-"
            "style dataset (any number of ranks at any step), or pass strict=False to go on at that batch of the new parts "
            "(samples are then repeated or skipped)"
        )

    def _tell_step(self, now: int | None, *, chosen: bool) -> None:
        """Say when a step of this loop takes another number of samples than in the checkpoint."""
        before = self._steps_before.pop(self.position.phase, None)
        self._step_samples.pop(self.position.phase, None)
        if now is not None:
            self._step_samples[self.position.phase] = now
        if before is None or now is None or before == now:
            return
        if self._moved and not chosen:
            self._warn(
                f"a step takes {before} → {now} samples now, since {self._world_before} → {self.world_size} ranks make it; the "
                f"learning rate is yours. Pass global_batch={before} to run.batches() to keep it"
            )
        else:
            self._say(f"a step takes {before} → {now} samples from step {self.step} on")

    def _say(self, message: str) -> None:
        """The same words once."""
        if message not in self._told:
            self._told.add(message)
            self._tell(message)


def _position_in(state: dict[str, Any]) -> Position:
    """Positions once counted batches only, of one rank and of one size."""
    position = Position.from_json(state["position"])
    size = (state.get("batches") or {}).get("batch_size")
    if "samples" not in state["position"] and isinstance(size, int):
        return replace(position, samples=position.batch * size)
    return position


def _changes(saved: dict[str, Any], here: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    keys = (*keys, *(("batches_per_epoch",) if saved.get("samples") is None else ()))
    return [f"{key} {saved.get(key)!r} → {here.get(key)!r}" for key in keys if saved.get(key) != here.get(key)]
