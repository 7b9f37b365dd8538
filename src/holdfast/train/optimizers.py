"""Which parameter here is which parameter of the checkpoint: an optimizer numbers them, and state must not reach another one.

Where all names are known, state follows the name: groups and the parameters in them may come in another order, as long as the same
parameters share a group. Otherwise it follows the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["fit_optimizer", "match_by_name", "reordered"]

Member = Sequence[Any]
"""[group, name or "", shape] of a parameter, in the order of the optimizer."""


def match_by_name(before: Sequence[Member], now: Sequence[Member]) -> list[int] | None:
    """For each parameter of the checkpoint its place here; None where names do not say it for all, or groups have other members."""
    if [member[:2] for member in before] == [member[:2] for member in now]:
        return list(range(len(now)))
    names_before, names_now = [member[1] for member in before], [member[1] for member in now]
    if not all(names_before) or len(set(names_before)) < len(names_before) or set(names_before) != set(names_now):
        return None
    if len(names_now) != len(names_before) or set(_groups(before).values()) != set(_groups(now).values()):
        return None
    here = {name: place for place, name in enumerate(names_now)}
    return [here[name] for name in names_before]


def _groups(members: Sequence[Member]) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = {}
    for group, name, _ in members:
        found.setdefault(group, set()).add(name)
    return {group: frozenset(names) for group, names in found.items()}


def reordered(
    tree: dict[str, Any], before: Sequence[Member], now: Sequence[Member], places: Sequence[int]
) -> tuple[dict[str, Any], Sequence[Member]]:
    """The state as if it had been saved in the order that parameters have here, and the parameters in this order."""
    numbers = [number for group in tree["param_groups"] for number in group["params"]]
    is_the_same = list(places) == list(range(len(places)))
    if is_the_same or len(numbers) != len(before) or not all(group["params"] for group in tree["param_groups"]):
        return tree, before
    here = dict(zip(numbers, places, strict=True))
    group_of = {places[index]: member[0] for index, member in enumerate(before)}
    groups: list[dict[str, Any]] = []
    for first in _first_places(now):
        saved = dict(tree["param_groups"][group_of[first]])
        order = sorted(range(len(saved["params"])), key=lambda index: here[saved["params"][index]])
        if isinstance(saved.get("param_names"), list):
            saved["param_names"] = [saved["param_names"][index] for index in order]
        saved["params"] = [here[saved["params"][index]] for index in order]
        groups.append(saved)
    members = [[member[0], member[1], before[saved][2]] for saved, member in _by_place(places, now)]
    return {**tree, "param_groups": groups, "state": {here[n]: s for n, s in tree["state"].items()}}, members


def _first_places(members: Sequence[Member]) -> list[int]:
    """The first parameter of each group."""
    first: dict[int, int] = {}
    for place, member in enumerate(members):
        first.setdefault(member[0], place)
    return list(first.values())


def _by_place(places: Sequence[int], now: Sequence[Member]) -> list[tuple[int, Member]]:
    saved = {place: index for index, place in enumerate(places)}
    return [(saved[place], member) for place, member in enumerate(now)]


def fit_optimizer(
    name: str, tree: Any, saved: Sequence[Member] | None, here: Sequence[Member], differences: list[str]
) -> Any:
    """Returns the tree without the state of parameters that differ, or None where groups or their sizes differ."""
    numbers = [(group, number) for group, item in enumerate(tree["param_groups"]) for number in item["params"]]
    if [group for group, _ in numbers] != [group for group, _, _ in here]:
        differences.append(
            f"{name}: parameter groups of {_sizes(numbers)} tensors in the checkpoint, {_sizes(here)} here"
        )
        return None
    for (_, number), before, now in zip(numbers, saved or here, here, strict=True):
        if before[2] != now[2]:
            differences.append(
                f"{name}: parameter {number} {now[1]} has the shape {before[2]} in the checkpoint, {now[2]} here"
            )
        elif before[1] != now[1]:
            differences.append(
                f"{name}: parameter {number} is {before[1] or 'unnamed'} in the checkpoint, {now[1] or 'unnamed'} here"
            )
        else:
            continue
        tree["state"].pop(number, None)
    return tree


def _sizes(members: Sequence[Sequence[Any]]) -> list[int]:
    groups = [member[0] for member in members]
    return [groups.count(group) for group in range(max(groups, default=-1) + 1)]
