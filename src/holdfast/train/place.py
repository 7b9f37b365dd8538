"""Where the script is in its loops: epoch, loop within the epoch, batch, and how it gets back there after a resume.

The script runs from its top again after a resume, so code before the place where it was interrupted runs twice and may draw random
numbers. The generators are therefore set to what the checkpoint holds each time the script comes closer to its old place: at
restore, when the epoch begins, and when the loop over batches goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.data.position import Position
from holdfast.train.loader import ResumableLoader
from holdfast.train.rng import capture_rng, restore_rng

__all__ = ["Place"]

_SAME_BATCHES = ("kind", "type", "samples", "batch_size", "sampler")
"""What decides which samples batch k of an epoch holds."""
_STATELESS = ("dataloader", "iterable")
"""Loaders without a state of their own: the position alone says where they are, even while a batch is being fetched."""


class Place:
    """Owned by the loop's thread. `warn` is told what a resume costs; `strict` refuses to continue an epoch with other batches."""

    def __init__(self, *, seed: int | None, strict: bool, warn: Callable[[str], None]) -> None:
        self.position = Position()
        self.step = 0
        self.seed = seed
        self.goal_epochs: int | None = None
        self.in_batch = False
        self.cut = False
        self.current: ResumableLoader | None = None
        self.batch_size: int | None = None
        self._strict, self._warn = strict, warn
        self._epochs: object | None = None
        self._loop: object | None = None
        self._phase = -1
        self._passes = 0
        self._loaders: dict[int, tuple[Any, ResumableLoader, int]] = {}
        self._nothing_left = False
        self._resumed: dict[str, Any] | None = None

    # ---- state

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        loader = self.current if self.position.batch else None
        return {
            "step": self.step,
            "position": self.position.to_json(),
            "seed": self.seed,
            "loader": None if loader is None else loader.state(),
            "batches": None if loader is None else loader.describe(),
            "rng": capture_rng(),
        }

    def resume(self, state: dict[str, Any]) -> list[str]:
        """Begin where `state` was. Returns lines about what could not be restored on this hardware.

        The state of an imported checkpoint has no position: the loop begins at its start, its random generators and seed as the
        script has set them, and only the steps are counted on.
        """
        self.step = int(state.get("step", 0))
        if "position" not in state:
            return []
        self.position = Position.from_json(state["position"])
        self.seed = int(state["seed"])
        self._resumed = state
        return restore_rng(state["rng"])

    def _set_generators(self, *, arrived: bool) -> None:
        if self._resumed is not None:
            restore_rng(self._resumed["rng"])
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

    def enter_loop(self, loader: Iterable[Any]) -> object | None:
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
        self.current = self._resumable(loader)
        self._set_generators(arrived=True)
        self._loop = object()
        return self._loop

    def rest(self) -> Iterator[Any]:
        """The batches that are left of the loop that was entered."""
        if self.current is None or self._nothing_left:
            return iter(())
        return self.current.iterate(self.position.epoch, self.position.batch)

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

    def batch_begins(self) -> None:
        self.in_batch = True

    def batch_done(self) -> None:
        self.in_batch = False
        self.position = self.position.after_batch()
        self.step += 1

    def leave_loop(self, token: object | None, *, counts: bool) -> None:
        """The loop has ended or was left. `counts`: an optimizer stepped on the batch at hand, so that it is consumed."""
        if token is None or self._loop is not token:
            return  # it was left before, by `leave_open_loop`
        self._loop = None
        if self.in_batch:
            self.in_batch = False
            self.cut = True
            if counts:
                self.position = self.position.after_batch()
                self.step += 1

    def leave_open_loop(self, *, counts: bool) -> None:
        """A loop whose iterator somebody still holds is over when its epoch or the run is."""
        self.leave_loop(self._loop, counts=counts)

    def _resumable(self, loader: Iterable[Any]) -> ResumableLoader:
        epoch = self.position.epoch
        # Loaders that are made anew for every epoch must not pile up, with their workers.
        self._loaders = {key: known for key, known in self._loaders.items() if known[2] >= epoch - 1}
        known = self._loaders.get(id(loader))
        made = ResumableLoader(loader, seed=self.seed or 0, warn=self._warn) if known is None else known[1]
        self._loaders[id(loader)] = (loader, made, epoch)
        self.batch_size = getattr(loader, "batch_size", None)
        self._nothing_left = False
        if self._resumed is not None and self.position.batch:
            saved = self._resumed.get("batches")
            changed = [] if saved is None else _changes(saved, made.describe())
            if changed and saved is not None and self.position.batch == saved.get("batches_per_epoch"):
                # Its last batch is done, and another loader takes over from the next epoch.
                self._nothing_left = True
                return made
            self._check(changed)
            if self._resumed["loader"] is not None:
                made.load_state(self._resumed["loader"])
        return made

    def _check(self, changed: list[str]) -> None:
        if not changed:
            return
        what = ", ".join(changed)
        where = f"batch {self.position.batch} of epoch {self.position.epoch}"
        if not self._strict:
            self._warn(f"strict=False: the loader has changed ({what}); {where} of the new one comes next")
            return
        raise UsageError(
            f"the loader has changed in the middle of an epoch ({what}), so {where} is not the sample that comes next. Finish this "
            "epoch with the old loader and change it at its end, pass strict=False to go on at that batch of the new one (samples "
            "are then repeated or skipped), or fresh=True to start over"
        )


def _changes(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    keys = [*_SAME_BATCHES, *(["batches_per_epoch"] if saved.get("samples") is None else [])]
    return [f"{key} {saved.get(key)!r} → {here.get(key)!r}" for key in keys if saved.get(key) != here.get(key)]
