"""Optimizer state follows the parameter's name, whatever order parameters and groups have; and never reaches another parameter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.read import CheckpointReader, open_checkpoint
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tree import flatten
from holdfast.checkpoint.write import write_checkpoint
from holdfast.core.errors import TrackedStateMismatch
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.train.optimizers import match_by_name
from holdfast.train.restoring import Loaded, load_checkpoint
from holdfast.train.tracked import Tracker


def net(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    made = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    made["c"].weight = made["a"].weight  # tied
    made["b"].bias.requires_grad_(False)
    return made


def optimizer(model: nn.Module, groups: list[list[str]], **options: Any) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    return torch.optim.AdamW(
        [{"params": [named[name] for name in names], "weight_decay": 0.1 * (1 + len(names))} for names in groups],
        **options,
    )


def step(model: nn.Module, adam: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = (
            torch.full_like(parameter, number + 1.0) * parameter.detach() if parameter.requires_grad else None
        )
    adam.step()


def tracker(model: nn.Module | None, adam: torch.optim.Optimizer) -> Tracker:
    made = Tracker()
    made.add({"adam": adam} if model is None else {"model": model, "adam": adam})
    return made


def saved(tracked: Tracker) -> CheckpointReader:
    store = MemoryStore("names")
    for entry in list(store.list()):
        store.delete(entry.key)
    flat = flatten({"tracked": tracked.state(), "holdfast": {"position": {}, "parameters": tracked.parameters()}})
    with ThreadPoolExecutor(1) as pool:
        written = write_checkpoint(
            stream(flat, lay_out(flat), step=1, epoch=0, metadata={}), store, run_id="run", attempt=1, sequence=1,
            known=KnownChunks(), tokens=random_token, hashing=pool, sending=pool, uploaded=set(),
        )  # fmt: skip
    ref = CheckpointRef(
        name=written.root.name, root_blake3=written.root_blake3, step=1, epoch=0, generation=1, attempt=1, unix_s=0.0,
        total_bytes=written.total_bytes,
    )  # fmt: skip

    def no_home(url: str) -> Store:
        raise AssertionError(url)

    return open_checkpoint(store, ref, no_home)


def load(reader: CheckpointReader, tracked: Tracker, *, strict: bool = True) -> Loaded:
    with ThreadPoolExecutor(1) as pool:
        return load_checkpoint(reader, tracked, pool, strict=strict)


def state_by_name(model: nn.Module, adam: torch.optim.Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    decays = {id(p): group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        state = {key: value.tolist() for key, value in adam.state.get(parameter, {}).items()}
        found[name] = (state, decays.get(id(parameter)))
    return found


NAMES = ["a.weight", "a.bias", "b.weight", "b.bias", "c.bias"]


@settings(max_examples=40)
@given(st.permutations(NAMES), st.integers(1, 4), st.randoms(use_true_random=False))
def test_state_and_options_follow_the_name(order: list[str], cut: int, chooser: Any) -> None:
    first = [order[:cut], order[cut:]]
    second = [list(group) for group in first]
    for group in second:
        chooser.shuffle(group)
    chooser.shuffle(second)
    model, other = net(0), net(1)
    adam, again = optimizer(model, first), optimizer(other, second)
    step(model, adam)
    assert load(saved(tracker(model, adam)), tracker(other, again)).skipped == ()
    assert state_by_name(other, again) == state_by_name(model, adam)
    # A frozen parameter never had any state.
    assert state_by_name(other, again)["b.bias"][0] == {}
    for one, two in ((model, adam), (other, again)):
        step(one, two)
    assert state_by_name(other, again) == state_by_name(model, adam)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_names_that_torch_keeps_in_groups_move_along() -> None:
    model, other = net(0), net(1)
    adam = torch.optim.AdamW(list(model.named_parameters()))
    again = torch.optim.AdamW(list(reversed(list(other.named_parameters()))))
    step(model, adam)
    load(saved(tracker(model, adam)), tracker(other, again))
    assert state_by_name(other, again) == state_by_name(model, adam)
    assert again.param_groups[0].get("param_names") == [name for name, _ in reversed(list(other.named_parameters()))]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([["a.weight", "a.bias", "b.weight", "b.bias"], ["c.bias"]], "parameter groups of"),
        ([["a.weight", "a.bias", "c.bias"], ["b.weight", "b.bias"]], "parameter 2 model.c.bias has the shape"),
    ],
)
def test_other_groups_are_refused(groups: list[list[str]], said: str) -> None:
    """Where parameters have changed their group, whose options are they to have?"""
    model, other = net(0), net(1)
    adam, again = optimizer(model, [NAMES[:3], NAMES[3:]]), optimizer(other, groups)
    step(model, adam)
    with pytest.raises(TrackedStateMismatch, match=said):
        load(saved(tracker(model, adam)), tracker(other, again))
    assert not again.state


def test_without_names_state_follows_the_number() -> None:
    """Where the model is not tracked nobody knows names; the order is what there is."""
    model, other = net(0), net(1)
    adam, again = optimizer(model, [NAMES]), optimizer(other, [NAMES[:1] + NAMES[2:3] + NAMES[1:2] + NAMES[3:]])
    step(model, adam)
    with pytest.raises(TrackedStateMismatch, match=r"parameter 1 .*has the shape"):
        load(saved(tracker(None, adam)), tracker(None, again))
    same = optimizer(other, [NAMES])
    load(saved(tracker(None, adam)), tracker(None, same))
    assert state_by_name(other, same) == state_by_name(model, adam)


def test_names_say_it_only_where_all_are_known_and_different() -> None:
    a, b, nameless = [0, "a", [3]], [0, "b", [3]], [0, "", [3]]
    assert match_by_name([a, b], [b, a]) == [1, 0]
    assert match_by_name([nameless, a], [nameless, a]) == [0, 1]
    assert match_by_name([nameless, a], [a, nameless]) is None
    assert match_by_name([a, a], [a, b]) is None
    assert match_by_name([a, b], [a]) is None
    assert match_by_name([a, [1, "b", [3]]], [b, a]) is None
    assert match_by_name([a, [1, "b", [3]]], [b, [1, "a", [3]]]) == [1, 0]
