"""How a Trainer is driven by a holdfast run: what of it is replaced while `fit()` trains, on this one Trainer and nowhere else.

before it trains
  _run_stage               the training, in `with run`; there everything is set up, so a restore finds its place
  _restore_modules_and_…   a checkpoint of Lightning's own is not read: the run knows where it is
  register_signal_handlers SIGTERM is the run's business
while it trains
  fit_loop                 its loop over epochs, which begins where the checkpoint was made (fitting.py)
  …_data_source.dataloader the run's batches (feed.py); what the script draws while it makes loaders is the same again
  val_loop                 an evaluation that is interrupted is redone; what it draws, and its workers, are its own
  _run_sanity_check        not again
  log_metrics              figures go into the run's ledger as well
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch.utils.data import DataLoader

from holdfast.data.seeds import derive_seed
from holdfast.train.lightning.book import Book
from holdfast.train.lightning.feed import Feed
from holdfast.train.lightning.fitting import Fitting
from holdfast.train.lightning.launching import as_launched
from holdfast.train.lightning.refusals import refuse_checkpoint, refuse_loader, tell_of_loader
from holdfast.train.lightning.versions import version_of
from holdfast.train.loader_twin import deafen
from holdfast.train.replacing import replaced
from holdfast.train.rng import preserved_rng, seed_rng
from holdfast.train.run import Run

__all__ = ["Driver"]


class Driver:
    """One call of `fit()`. `callback` is told of the Trainer's events; `make_run` is called when training begins."""

    def __init__(self, trainer: Any, callback: Any, make_run: Callable[[], Run]) -> None:
        self._trainer, self._callback, self._make_run = trainer, callback, make_run
        self.run: Run | None = None
        self._checkpoint: Any = None
        self._early = ExitStack()
        train, restore = functools.partial(self._train, trainer._run_stage), self._take_note_of_checkpoint
        for owner, parts in (
            (trainer, {"_run_stage": train}),
            (trainer._checkpoint_connector, {"_restore_modules_and_callbacks": restore}),
            (trainer._signal_connector, {"register_signal_handlers": lambda: None}),
        ):
            self._early.enter_context(replaced(owner, **parts))

    def let_go(self) -> None:
        """`fit()` will not come to its training."""
        self._early.close()

    def _take_note_of_checkpoint(self, checkpoint_path: Any = None, *_: Any, **__: Any) -> None:
        self._checkpoint = checkpoint_path

    # ---- the training

    def _train(self, original: Callable[[], Any]) -> Any:
        self._early.close()
        trainer, loop = self._trainer, self._trainer.fit_loop
        with as_launched(trainer):
            run = self.run = self._make_run()
            try:
                with run, ExitStack() as stack:
                    book = Book(trainer, self._callback, version_of(trainer))
                    fitting = Fitting(trainer, run, book)
                    stack.callback(fitting.close)
                    for owner, parts in self._parts(run, book, fitting):
                        stack.enter_context(replaced(owner, **parts))
                    self._restore(run, book)
                    loop._combined_loader = None  # that of another fit() is not this run's
                    return None if run.finished else original()
            finally:
                self.run = None

    def _restore(self, run: Run, book: Book) -> None:
        trainer = self._trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        run.track(
            model=trainer.lightning_module, trainer=book,
            **_numbered("optimizer", trainer.optimizers), **_numbered("scheduler", schedulers),
        )  # fmt: skip
        run.restore()
        refuse_checkpoint(trainer, self._checkpoint, run.url, is_resumed=book.is_loaded)
        if book.is_loaded:
            book.restore(finished=run.finished)

    def _parts(self, run: Run, book: Book, fitting: Fitting) -> Iterator[tuple[Any, dict[str, Any]]]:
        trainer, loop = self._trainer, self._trainer.fit_loop
        epoch_loop, val_loop, connector = loop.epoch_loop, loop.epoch_loop.val_loop, trainer._logger_connector
        of_training, of_evaluation = loop._data_source.dataloader, val_loop._data_source.dataloader
        sanity_check, setup_training, setup_evaluation = trainer._run_sanity_check, loop.setup_data, val_loop.setup_data
        evaluate, log = val_loop.run, connector.log_metrics

        def set_up_training() -> None:
            with book.epoch_of_loaders(0):
                setup_training()

        def set_up_evaluation() -> None:
            with book.epoch_of_loaders(1):
                setup_evaluation()
            for loader in val_loop._combined_loader.flattened if val_loop._combined_loader is not None else ():
                if isinstance(loader, DataLoader):
                    deafen(loader)

        yield trainer, {"_run_sanity_check": lambda: None if book.is_loaded else sanity_check()}
        yield loop, {"run": fitting.run, "setup_data": set_up_training}
        yield loop._data_source, {"dataloader": lambda: self._make_feed(run, book, of_training)}
        yield epoch_loop, fitting.parts()
        yield val_loop, {"run": functools.partial(self._evaluate, run, book, evaluate), "setup_data": set_up_evaluation}
        yield val_loop._data_source, {"dataloader": lambda: self._load(book, of_evaluation)}
        yield connector, {"log_metrics": functools.partial(self._log, run, log)}

    # ---- data

    def _load(self, book: Book, dataloader: Callable[[], Any]) -> Any:
        """A split that the script draws there must be the same at every start."""
        with preserved_rng():
            step = self._trainer.current_epoch
            seed_rng(derive_seed(book.seed, "dataloaders"), world_size=1, rank=0, step=step)
            return dataloader()

    def _make_feed(self, run: Run, book: Book, dataloader: Callable[[], Any]) -> Feed:
        trainer = self._trainer
        loader = self._load(book, dataloader)
        refuse_loader(trainer, loader)
        feed = Feed(run, loader, (trainer.global_rank, trainer.world_size))
        tell_of_loader(trainer, feed)
        return feed

    # ---- evaluations and logs

    def _evaluate(self, run: Run, book: Book, original: Callable[[], Any]) -> Any:
        trainer = self._trainer
        if trainer.sanity_checking:
            return original()
        seed, step = derive_seed(book.seed, "evaluation"), trainer.global_step
        # Averaged weights may be swapped in meanwhile.
        with run.evaluating(), run.mutating(), preserved_rng():
            seed_rng(seed, world_size=trainer.world_size, rank=trainer.global_rank, step=step)
            return original()

    def _log(self, run: Run, original: Callable[..., None], metrics: dict[str, Any], step: int | None = None) -> None:
        if metrics and not self._trainer.sanity_checking:
            run.log(**{name: value for name, value in metrics.items() if name not in ("epoch", "step")})
        original(metrics, step=step)


def _numbered(name: str, objects: list[Any]) -> dict[str, Any]:
    return {f"{name}_{number}" if number else name: one for number, one in enumerate(objects)}
