"""Lightning's loop over epochs, begun where the checkpoint was made.

It is what `trainer.fit_loop.run()` does, with the run's epochs around it. A boundary, and so a beginning, is at one of three
places:

    epoch begins ─ hooks ─ batch ─ … ─ batch ┬ batch ─ … ─ last batch ┬ evaluation, its logs ─ hooks ─ epoch's logs ┬ epoch begins
                                             1                        2                                             3

1 is where the next batch is asked for. 2 comes before the evaluation at the end of an epoch, which may take long: a notice ends
it, and it is redone. Where an epoch is ended before its loader is (`limit_train_batches`), there is no 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from holdfast.train.lightning.book import Book
from holdfast.train.lightning.feed import Epochs, Feed
from holdfast.train.run import Run

__all__ = ["Fitting"]


class Fitting:
    """One training."""

    def __init__(self, trainer: Any, run: Run, book: Book) -> None:
        self._trainer, self._run, self._book = trainer, run, book
        self._loop = trainer.fit_loop
        self._epochs = Epochs(run, self._total_epochs)
        self._is_resuming = False
        """The epoch at hand is one that was begun before."""
        self._run_epoch, self._end_batch = self._loop.epoch_loop.run, self._loop.epoch_loop.on_advance_end

    def parts(self) -> dict[str, Callable[..., None]]:
        """What the loop over batches is driven by."""
        return {"run": self._batches, "on_advance_end": self._batch_done}

    def close(self) -> None:
        if (feed := self._feed()) is not None:
            feed.close()
            # Who asks the Trainer for its loader later gets that.
            self._loop._combined_loader.flattened = [feed.loader]
        self._epochs.close()

    # ---- epochs

    def run(self) -> None:
        loop, book = self._loop, self._book
        loop.setup_data()
        is_under_way = book.is_loaded and not book.was_over
        if loop.skip and not is_under_way:
            return
        self._is_resuming = book.is_loaded and book.in_epoch
        is_whole = False
        loop.reset()
        loop.on_run_start()
        while self._is_resuming or not loop.done:
            try:
                self._begin_epoch()
                loop.advance()
                is_whole = self._end_epoch()
            except StopIteration:
                break
            finally:
                _settle(loop)
        loop._restarting = False
        if is_whole or not self._epochs.has_begun:
            self._epochs.finish()
        # Averaged weights may take the place of the others now.
        with self._run.mutating():
            loop.on_run_end()
        book.is_over = True

    def _begin_epoch(self) -> None:
        trainer = self._trainer
        self._epochs.next()
        if not self._is_resuming:
            self._loop.on_advance_start()
        elif trainer.progress_bar_callback is not None:
            # Other callbacks have been told: in the middle of an epoch, their states are what they made of it.
            trainer.progress_bar_callback.on_train_epoch_start(trainer, trainer.lightning_module)
        feed = self._feed()
        assert feed is not None
        feed.begin_epoch(trainer.accumulate_grad_batches)
        self._book.in_epoch = True

    def _end_epoch(self) -> bool:
        """Whether it was the whole epoch: not when `max_steps` or `should_stop` ends the training in its middle."""
        epoch_loop, book, feed = self._loop.epoch_loop, self._book, self._feed()
        # Without being done it only ends when a hook says that this epoch is to be skipped.
        is_whole = epoch_loop._num_ready_batches_reached() or not epoch_loop.done
        if feed is not None:
            feed.end_batches()
        if not is_whole:
            book.cut_at = book.progress()
        self._loop.on_advance_end()
        book.in_epoch = not is_whole
        return bool(is_whole)

    def _feed(self) -> Feed | None:
        loaders = [] if self._loop._combined_loader is None else self._loop._combined_loader.flattened
        return next((loader for loader in loaders if isinstance(loader, Feed)), None)

    def _total_epochs(self) -> int:
        """As far as it can be known; a guess that is too low costs nothing but wrong figures of the run's expected length."""
        trainer, loop = self._trainer, self._loop
        known = [] if loop.max_epochs == -1 else [loop.max_epochs]
        if loop.max_steps != -1 and math.isfinite(loop.max_batches) and trainer.lightning_module.automatic_optimization:
            known.append(math.ceil(loop.max_steps / math.ceil(loop.max_batches / trainer.accumulate_grad_batches)))
        return min(known, default=1)

    # ---- batches

    def _batches(self, data_fetcher: Any) -> None:
        if not self._is_resuming:
            self._run_epoch(data_fetcher)
            return
        self._is_resuming = False
        epoch_loop, book = self._loop.epoch_loop, self._book
        epoch_loop.on_run_start(data_fetcher)
        if book.owes_batch_end:
            self._batch_done(data_fetcher)
        while not epoch_loop.done:
            try:
                epoch_loop.advance(data_fetcher)
                epoch_loop.on_advance_end(data_fetcher)
            except StopIteration:
                break
            finally:
                _settle(epoch_loop)

    def _batch_done(self, data_fetcher: Any) -> None:
        feed = self._feed()
        if feed is not None and self._loop.epoch_loop._num_ready_batches_reached():
            self._book.owes_batch_end = True
            feed.end_batches()
        self._end_batch(data_fetcher)
        self._book.owes_batch_end = False


def _settle(loop: Any) -> None:
    """What Lightning does after every turn of a loop: it is no restart any more."""
    done = getattr(loop, "on_iteration_done", functools.partial(setattr, loop, "_restarting", False))
    done()
