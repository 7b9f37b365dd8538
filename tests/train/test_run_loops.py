"""The loops: every sample once, in the same order, whatever shape the script's loops have and wherever they are interrupted."""

# What raises or warns here is a whole run, which takes more than one statement.
# ruff: noqa: PT012
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from run_parts import Killed, Stores, seeded
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import holdfast
from holdfast import HoldfastWarning, UsageError

Script = Callable[[holdfast.Run, "Record"], None]


class Record(dict[str, list[Any]]):
    """What the script did, tracked; and the step in which it is to die."""

    kill_in_step = -1

    def saw(self, run: holdfast.Run, batch: Any, phase: str = "") -> None:
        if run.step == self.kill_in_step:
            raise Killed
        values = batch[0].tolist() if isinstance(batch, list | tuple) else batch
        self.setdefault("seen", []).append([phase, run.epoch, run.batch, values, float(torch.rand(1))])


def numbers(count: int = 10, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count)), batch_size=batch_size, shuffle=True, **options)


def attempt(script: Script, stores: Stores, kill_in_step: int = -1, **options: Any) -> list[Any]:
    seeded()
    record = Record()
    record.kill_in_step = kill_in_step
    kept: dict[str, Any] = {"record": {}}
    with holdfast.Run("./run", save_every="1 step", open_store=stores, **options) as run:

        class Stateful:
            def state_dict(self) -> dict[str, Any]:
                return dict(record)

            def load_state_dict(self, state: dict[str, Any]) -> None:
                record.clear()
                record.update(state)

        run.track(record=Stateful(), kept=kept)
        script(run, record)
    return record.get("seen", [])


def flat(run: holdfast.Run, record: Record) -> None:
    for batch in run.batches(numbers(), epochs=2):
        record.saw(run, batch)


def bare(run: holdfast.Run, record: Record) -> None:
    for batch in run.batches(numbers(20)):
        record.saw(run, batch)


def nested(run: holdfast.Run, record: Record) -> None:
    loader = numbers()
    for _ in run.epochs(2):
        torch.rand(3)  # code before the loop draws again after a resume, and must not matter
        for batch in run.batches(loader):
            record.saw(run, batch)
        torch.rand(2)


def continuing(run: holdfast.Run, record: Record) -> None:
    for epoch in run.epochs(3):
        if epoch == 1:
            continue
        for batch in run.batches(numbers()):
            if run.batch == 2 and run.step != record.kill_in_step:
                continue
            record.saw(run, batch)


def breaking(run: holdfast.Run, record: Record) -> None:
    for _ in run.epochs(3):
        for batch in run.batches(numbers()):
            record.saw(run, batch)
            if run.batch == 3:
                break


def two_phases(run: holdfast.Run, record: Record) -> None:
    first, second = numbers(), numbers(6)
    for _ in run.epochs(2):
        for batch in run.batches(first):
            record.saw(run, batch, "first")
            if run.batch == 1:
                break
        torch.rand(5)
        for batch in run.batches(second):
            record.saw(run, batch, "second")


def new_loader_each_epoch(run: holdfast.Run, record: Record) -> None:
    for _ in run.epochs(3):
        for batch in run.batches(numbers(6)):
            record.saw(run, batch)


def listed(run: holdfast.Run, record: Record) -> None:
    batches = [[1, 2], [3], [4, 5]]
    for batch in run.batches([torch.tensor(b).tolist() for b in batches], epochs=3):
        record.saw(run, str(batch))


def evaluating_in_the_middle(run: holdfast.Run, record: Record) -> None:
    for _ in run.epochs(2):
        for batch in run.batches(numbers()):
            record.saw(run, batch)
            if run.step % 3 == 2:
                with run.evaluating():
                    torch.rand(4)


def empty_then_full(run: holdfast.Run, record: Record) -> None:
    for epoch in run.epochs(3):
        for batch in run.batches(numbers() if epoch else []):
            record.saw(run, batch)


@pytest.mark.parametrize(
    "script",
    [
        flat,
        bare,
        nested,
        continuing,
        breaking,
        two_phases,
        new_loader_each_epoch,
        listed,
        evaluating_in_the_middle,
        empty_then_full,
    ],
    ids=lambda script: script.__name__,
)
def test_interrupted_in_every_step(script: Script) -> None:
    whole = attempt(script, Stores())
    assert whole
    stores = Stores()
    died = 0
    for step in range(40):
        try:
            done = attempt(script, stores, kill_in_step=step)
        except Killed:
            died += 1
            continue
        break
    assert done == whole
    assert died >= len(whole) - 1


class Endless(IterableDataset[torch.Tensor]):
    """No length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(12).split(1))


def streaming(run: holdfast.Run, record: Record) -> None:
    for batch in run.batches(DataLoader(Endless(), batch_size=3), epochs=2):
        record.saw(run, str(batch.flatten().tolist()))


@pytest.mark.filterwarnings("ignore:going to batch:holdfast.HoldfastWarning")
def test_a_stream_without_length_or_state() -> None:
    whole = attempt(streaming, Stores())
    stores = Stores()
    for step in (1, 3, 6):
        with pytest.raises(Killed):
            attempt(streaming, stores, kill_in_step=step)
    assert attempt(streaming, stores) == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("tracked", [False, True])
def test_stateful_loader_in_the_middle_of_an_epoch(tracked: bool) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def script(run: holdfast.Run, record: Record) -> None:
        loader = torchdata.StatefulDataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True)
        if tracked:
            run.track(loader=loader)
        for batch in run.batches(loader, epochs=2):
            record.saw(run, batch)

    whole = attempt(script, Stores())
    stores = Stores()
    for step in (1, 2, 7):
        with pytest.raises(Killed):
            attempt(script, stores, kill_in_step=step)
    assert attempt(script, stores) == whole


def test_break_counts_the_batch_only_if_an_optimizer_stepped() -> None:
    for steps in (False, True):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        with holdfast.Run("./run", open_store=Stores()) as run:
            run.track(model=model, optimizer=optimizer)
            for _ in run.batches([1, 2, 3]):
                if steps:
                    model(torch.ones(1, 1)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                break
            assert (run.step, run.batch) == (int(steps), int(steps))


def test_a_generator_that_is_held_counts_as_left() -> None:
    """`tqdm` and the like keep the iterator after a `break`; the epoch's end and the run's end close it."""
    stores = Stores()
    with holdfast.Run("./run", open_store=stores) as run:
        run.track(state={"n": 0})
        held = []
        for _ in run.epochs(2):
            held.append(run.batches([1, 2, 3]))
            next(held[-1])
    assert stores.checkpoints()[-1].step == 2
    assert run.epoch == 2


def test_an_exception_that_the_script_catches_goes_on_with_the_next_epoch() -> None:
    seen = []
    stores = Stores()
    with holdfast.Run("./run", save_every="1 step", open_store=stores) as run:
        run.track(state={"n": 0})
        for epoch in run.epochs(3):
            try:
                for batch in run.batches([1, 2]):
                    seen.append((epoch, batch))
                    if epoch == 1:
                        raise ValueError("bad batch")
            except ValueError:
                continue
    assert seen == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]


def misuse(message: str, use: Callable[[holdfast.Run], None]) -> None:
    with pytest.raises(UsageError, match=message), holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={"n": 0})
        use(run)


def test_misuse_is_refused_in_plain_words() -> None:
    def loops_in_range(run: holdfast.Run) -> None:
        for _ in range(2):
            for _ in run.batches([1]):
                pass

    def zipped(run: holdfast.Run) -> None:
        for _ in zip(run.batches([1, 2]), run.batches([3, 4]), strict=False):
            pass

    def inner(run: holdfast.Run) -> None:
        for _ in run.epochs(1):
            for _ in run.batches([1]):
                for _ in run.batches([2]):
                    pass

    def inner_epochs(run: holdfast.Run) -> None:
        for _ in run.epochs(2):
            for _ in run.batches([1], epochs=2):
                pass

    def text(run: holdfast.Run) -> None:
        for _ in run.epochs("3"):  # type: ignore[arg-type]
            pass

    def late(run: holdfast.Run) -> None:
        run.restore()
        run.track(other={})

    misuse(r"for epoch in run.epochs\(N\)", loops_in_range)
    misuse("inside another one", zipped)
    misuse("inside another one", inner)
    misuse("inside another one", inner_epochs)
    misuse("is an integer", text)
    misuse("before restore", late)


def test_a_changed_loader_is_noticed_in_the_middle_of_an_epoch_only() -> None:
    def sized(size: int, count: int = 10, **options: Any) -> Script:
        def script(run: holdfast.Run, record: Record) -> None:
            for batch in run.batches(numbers(count, size, **options), epochs=2):
                record.saw(run, batch)

        return script

    stores = Stores()
    with pytest.raises(Killed):
        attempt(sized(2), stores, kill_in_step=3)
    with pytest.raises(UsageError, match=r"batch_size 2 → 5.*batch 3 of epoch 0.*strict=False"):
        attempt(sized(5), stores)
    with pytest.raises(UsageError, match="samples 10 → 12"):
        attempt(sized(2, 12), stores)
    with pytest.raises(Killed):
        attempt(sized(2, 10, drop_last=True), stores, kill_in_step=5)
    assert len(attempt(sized(5), stores)) == 5 + 2

    stores = Stores()
    with pytest.raises(Killed):
        attempt(sized(2), stores, kill_in_step=3)
    with pytest.warns(HoldfastWarning, match="the loader has changed"):
        attempt(sized(1), stores, strict=False)


def test_extending_a_finished_run_equals_a_longer_one() -> None:
    def epochs(count: int) -> Script:
        def script(run: holdfast.Run, record: Record) -> None:
            for batch in run.batches(numbers(), epochs=count):
                record.saw(run, batch)

        return script

    whole = attempt(epochs(4), Stores())
    stores = Stores()
    attempt(epochs(2), stores)
    assert attempt(epochs(4), stores) == whole[:10], "a finished run is not trained again"
    with pytest.raises(Killed):
        attempt(epochs(4), stores, extend=True, kill_in_step=13)
    assert attempt(epochs(4), stores) == whole, "once extended, it is resumed like any other"
    stopped = attempt(nested_until(7), Stores())
    stores = Stores()
    attempt(nested_until(4), stores)
    assert attempt(nested_until(7), stores, extend=True) == stopped, (
        "left with break, and extended in the middle of an epoch"
    )


def nested_until(limit: int) -> Script:
    def script(run: holdfast.Run, record: Record) -> None:
        loader = numbers()
        for _ in run.epochs(9):
            for batch in run.batches(loader):
                record.saw(run, batch)
                if run.step + 1 == limit:
                    break
            if run.step >= limit:
                break

    return script


def test_loaders_made_for_every_epoch_do_not_pile_up() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []
    with holdfast.Run("./run", open_store=Stores()) as run:
        run.track(state={"n": 0})
        for _ in run.epochs(8):
            loader = numbers()
            alive.append(weakref.ref(loader))
            for _ in run.batches(loader):
                pass
        del loader
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 2
