"""How a Trainer is driven by a holdfast run: which of its methods are wrapped, and why.

_inner_training_loop       in `with run`; while it lasts, these are wrapped on this one Trainer, and nowhere else:

  get_train_dataloader     the run's batches (feed.py)
  _init_training_state     prepare first, since a restore needs the optimizer; restore; say which epoch and batch come next
  _prepare_for_training    was done already
  _run_epoch               in the epoch that is resumed: begin to count at its next batch; skip nothing, the feed is there
  _load_rng_state          generators are the run's business
  _maybe_log_save_evaluate remembers what there is to log
  evaluate                 between epochs it is redone after a notice, not waited for; what it draws is its own
  get_eval_dataloader      its workers leave signals to the main process
  _finalize_training       ends the last epoch; times and averages are those of all attempts
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import transformers.trainer
from transformers.trainer_utils import TrainOutput

from holdfast.core.errors import UsageError
from holdfast.data.seeds import derive_seed
from holdfast.train.huggingface.book import BestModel, Book
from holdfast.train.huggingface.feed import Feed
from holdfast.train.huggingface.frozen import TrainedPart
from holdfast.train.huggingface.refusals import refuse_loader, refuse_trainer, tell_of_streams
from holdfast.train.huggingface.versions import check_parts
from holdfast.train.loader_twin import deafen
from holdfast.train.replacing import replaced
from holdfast.train.rng import preserved_rng, seed_rng
from holdfast.train.run import Run

__all__ = ["Driver"]


class _Finished(Exception):
    """The run was complete before: nothing is trained. Never leaves this module."""


class Driver:
    """One Trainer. `callback` is told of the Trainer's events; `make_run` is called for every `train()`."""

    def __init__(self, trainer: Any, callback: Any, make_run: Callable[[Any], Run], *, keeps_frozen: bool) -> None:
        check_parts(trainer)
        self._keeps_frozen = keeps_frozen
        self._trainer, self._callback, self._make_run = trainer, callback, make_run
        self.run: Run | None = None
        self._feed: Feed | None = None
        self._book = Book(trainer, callback)
        self._best = BestModel()
        self._prepared: Any = None
        self._is_evaluating = False
        self._original_loop = trainer._inner_training_loop

        @functools.wraps(self._original_loop)
        def loop(*args: Any, **kwargs: Any) -> Any:
            return self._train(*args, **kwargs)

        trainer._inner_training_loop = loop

    # ---- one call of train()

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        trainer, callbacks = self._trainer, self._trainer.callback_handler.callbacks
        refuse_trainer(trainer, is_trial=kwargs.get("trial") is not None)
        # What holdfast does at an event comes before what others do there: they will do it again after a resume.
        callbacks.remove(self._callback)
        callbacks.insert(0, self._callback)
        self._book, self._best = Book(trainer, self._callback), BestModel()
        self.run = self._make_run(trainer.args)
        try:
            with self.run, ExitStack() as stack:
                stack.callback(self._let_go)
                stack.enter_context(replaced(trainer, **self._wrapped(trainer)))
                stack.enter_context(replaced(trainer.args, eval_on_start=trainer.args.eval_on_start))
                try:
                    return self._original_loop(*args, **kwargs)
                except _Finished:
                    return self._output_of_before()
        finally:
            self.run = None

    def _let_go(self) -> None:
        feed, self._feed, self._prepared = self._feed, None, None
        if feed is not None:
            feed.close()

    def _wrapped(self, trainer: Any) -> dict[str, Any]:
        get_loader, prepare, init = (
            trainer.get_train_dataloader, trainer._prepare_for_training, trainer._init_training_state,
        )  # fmt: skip
        run_epoch, log, finalize, evaluate, get_eval = (
            trainer._run_epoch, trainer._maybe_log_save_evaluate, trainer._finalize_training, trainer.evaluate,
            trainer.get_eval_dataloader,
        )  # fmt: skip

        def deaf(*args: Any, **kwargs: Any) -> Any:
            loader = get_eval(*args, **kwargs)
            deafen(loader)
            return loader

        return {
            "get_train_dataloader": lambda: self._take_loader(get_loader()),
            "_init_training_state": functools.partial(self._begin, prepare, init),
            "_prepare_for_training": lambda *_, **__: self._prepared,
            "_run_epoch": functools.partial(self._run_epoch, run_epoch),
            "_load_rng_state": lambda _: None,
            "_maybe_log_save_evaluate": functools.partial(self._log, log),
            "evaluate": functools.wraps(evaluate)(functools.partial(self._evaluate, evaluate)),
            "get_eval_dataloader": functools.wraps(get_eval)(deaf),
            "_finalize_training": functools.partial(self._finalize, finalize),
        }

    # ---- the beginning

    def _take_loader(self, loader: Any) -> Feed:
        assert self.run is not None
        args = self._trainer.args
        batches_per_step, world_size = args.gradient_accumulation_steps, args.world_size
        feed = Feed(self.run, loader, batches_per_step, rank=args.process_index, world_size=world_size)
        refuse_loader(loader, feed.base, batches_per_step, world_size)
        tell_of_streams(feed.base)
        self._feed = feed
        return feed

    def _begin(
        self,
        prepare: Callable[..., Any],
        init: Callable[..., Any],
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Returns the epoch to begin with, and how many of its batches are done."""
        trainer, run, feed, book = self._trainer, self.run, self._feed, self._book
        assert run is not None
        assert feed is not None
        self._prepared = prepare(max_steps, feed, None)
        init(max_steps, num_update_steps_per_epoch, num_train_epochs, None, trial)
        parts = {"scaler": getattr(trainer.accelerator, "scaler", None), "best_model": self._best_if_asked()}
        run.track(model=self._tracked_model(), optimizer=trainer.optimizer, scheduler=trainer.lr_scheduler, trainer=book,
                  **{name: part for name, part in parts.items() if part is not None})  # fmt: skip
        run.restore()
        self._check(resume_from_checkpoint)
        if book.is_loaded:
            book.check_frozen()
            if not run.finished:
                book.check_step(in_epoch=run.batch > 0)
            book.restore_state()
            self._find_best(trainer.state)
            trainer.args.eval_on_start = False
        if run.finished:
            raise _Finished
        feed.open(num_train_epochs)
        return run.epoch, feed.batches_done

    def _tracked_model(self) -> torch.nn.Module:
        model: torch.nn.Module = self._trainer.model
        if self._keeps_frozen:
            return model
        trained = TrainedPart(model)
        self._book.frozen = trained.fingerprint()
        return trained

    def _best_if_asked(self) -> BestModel | None:
        return self._best if self._trainer.args.load_best_model_at_end else None

    def _check(self, resume_from_checkpoint: str | None) -> None:
        run, is_resumed = self.run, self._book.is_loaded
        assert run is not None
        if resume_from_checkpoint is not None and not is_resumed:
            raise UsageError(
                f"train(resume_from_checkpoint={str(resume_from_checkpoint)!r}): {run.url} has no checkpoint yet, and a run begins "
                "at its own first step. Call train() without it (a run that has one is resumed unasked); to begin with those "
                "weights, load them with from_pretrained() before"
            )

    def _find_best(self, state: Any) -> None:
        folder = state.best_model_checkpoint
        if folder is None:
            return
        if self._trainer.args.should_save:
            self._best.put_back(folder, state.best_global_step)
        self._trainer.accelerator.wait_for_everyone()
        if not os.path.isdir(folder):
            state.best_model_checkpoint = None

    # ---- while it trains

    def begin_training(self) -> None:
        self._book.restore_averages()

    def begin_epoch(self) -> None:
        if self._feed is not None:
            self._feed.begin_epoch()

    def end_epoch(self, control: Any) -> None:
        if self._feed is not None:
            self._feed.end_epoch(cut=control.should_epoch_stop or control.should_training_stop)

    def saved(self, state: Any) -> None:
        """The Trainer has made a checkpoint of its own."""
        is_mine = self._best_if_asked() is not None and self._trainer.args.should_save
        if is_mine and state.best_global_step == state.global_step and state.best_model_checkpoint is not None:
            self._best.keep(state.best_model_checkpoint, state.global_step)

    def _run_epoch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._book.is_loaded or kwargs["epoch"] != kwargs["epochs_trained"]:
            return original(*args, **kwargs)
        assert self.run is not None
        kwargs["resume_from_checkpoint"] = self.run.url
        skip = transformers.trainer.skip_first_batches

        def skipped(loader: Any, count: int = 0) -> Any:
            return loader if isinstance(loader, Feed) else skip(loader, count)

        with replaced(transformers.trainer, skip_first_batches=skipped):
            return original(*args, **kwargs)

    def _log(
        self,
        original: Callable[..., Any],
        tr_loss: Any,
        grad_norm: Any,
        *args: Any,
        learning_rate: Any = None,
        **kwargs: Any,
    ) -> Any:
        grad_norm, learning_rate = self._book.newest(grad_norm, learning_rate)
        return original(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_evaluating or self.run is None:
            return original(*args, **kwargs)  # one of several evaluation sets
        self._is_evaluating = True
        settings, step = self._trainer.args, self._trainer.state.global_step
        try:
            # Whether the loader's workers are new, which draws a seed for them, must not reach the training.
            with self.run.evaluating(), preserved_rng():
                seed = derive_seed(settings.seed, "evaluation")
                seed_rng(seed, world_size=settings.world_size, rank=settings.process_index, step=step)
                return original(*args, **kwargs)
        finally:
            self._is_evaluating = False

    # ---- the end

    def _finalize(self, original: Callable[..., Any], trial: Any, num_train_samples: Any, start_time: float) -> Any:
        assert self._feed is not None
        self._feed.finish()
        return original(trial, num_train_samples, start_time - self._book.earlier_s)

    def _output_of_before(self) -> TrainOutput:
        """What train() returned when the run was finished."""
        trainer = self._trainer
        trainer.is_in_train = False
        last: dict[str, Any] = next(
            (entry for entry in reversed(trainer.state.log_history) if "train_loss" in entry), {}
        )
        metrics = {name: value for name, value in last.items() if name != "step"}
        return TrainOutput(trainer.state.global_step, metrics.get("train_loss", 0.0), metrics)
