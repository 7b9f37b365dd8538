"""The node policies' rules from their descriptions, for one job at one moment, in whole numbers and fractions.

d is the changeover of a whole gang, L what a preemption may take back, T the tick.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from slow_nodes import Rule, Scene, Wanted


def _held(scene: Scene) -> Wanted:
    return scene.count(spot=True), scene.count(spot=False)


def _most_loss_of_slack(scene: Scene, wanted: Wanted) -> int:
    """How much slack the coming tick may cost if so many are wanted, as far as a careful reader can say before it."""
    world = scene.world
    held = _held(scene)
    ready = scene.count(spot=True, joined=True), scene.count(spot=False, joined=True)
    stay = min(ready[0], wanted[0]) + min(ready[1], wanted[1])
    if scene.divisible:
        return 0 if stay >= scene.useful else world.tick_s
    restarting = scene.restart_s if scene.able else 0
    if stay < sum(ready):
        restarting = world.restart_s
    still_launching = min(held[0], wanted[0]) + min(held[1], wanted[1]) > stay
    new = wanted[0] > held[0] or wanted[1] > held[1]
    if still_launching or (new and world.launch_s < world.tick_s):
        restarting += world.restart_s
    works_s = max(0, world.tick_s - restarting)
    done = Fraction(world.speeds[stay] if stay >= world.fewest else 0, 1000) * works_s
    rest = max(Fraction(0), scene.left - done) * 1000 / world.speeds[-1]
    return scene.slack_s - (world.deadline_s - scene.now_s - world.tick_s - ceil(rest))


def _good(scene: Scene, wanted: Wanted) -> bool:
    """Safe, with room for what is under way, or where nodes are missing for a top-up."""
    world, held = scene.world, _held(scene)
    d = world.move_s
    after = scene.slack_s - _most_loss_of_slack(scene, wanted)
    if sum(wanted) < scene.useful:
        room = max(d, world.tick_s) + world.saves_every_s
    else:
        launching = scene.launch_left_s
        restarting = scene.restart_s if scene.able and not scene.divisible else 0
        takes = max(launching + world.restart_s if launching else 0, restarting)
        if wanted[0] > held[0] or wanted[1] > held[1]:
            takes = d
        room = max(0, takes - world.tick_s)
    return after >= d + room + (world.saves_every_s if wanted[0] else 0)


def _spot_first(scene: Scene) -> Wanted:
    demand = min(scene.world.floor, scene.useful)
    spot = min(scene.can_hold, scene.useful - demand)
    return (spot, demand) if spot + demand >= min(scene.world.fewest, scene.useful) else (0, 0)


def _filled(scene: Scene) -> Wanted:
    fixed = min(max(_held(scene)[1], scene.world.floor), scene.useful)
    spot = min(scene.can_hold, scene.useful - fixed)
    return spot, scene.useful - spot


def _net(scene: Scene) -> Wanted:
    spot, demand = _held(scene)
    if scene.slack_s >= scene.world.move_s or demand >= scene.useful:
        return 0, scene.useful
    return min(spot, scene.useful), scene.useful - min(spot, scene.useful)


def _first(scene: Scene, *options: tuple[bool, Wanted]) -> Wanted:
    for holds, wanted in options:
        if holds and _good(scene, wanted):
            return wanted
    return _net(scene)


def on_demand(scene: Scene) -> Wanted:
    return 0, scene.useful


def spot_only(scene: Scene) -> Wanted:
    return _spot_first(scene)


def greedy(scene: Scene) -> Wanted:
    return _first(scene, (True, _spot_first(scene)), (True, _filled(scene)))


def _work_s(scene: Scene) -> int:
    world = scene.world
    return -(-world.items // world.nodes) * world.item_s if scene.divisible else world.work_s


def uniform_progress(scene: Scene) -> Wanted:
    world = scene.world
    pace = Fraction(_work_s(scene), world.deadline_s)
    done = _work_s(scene) - scene.rest_s
    demand = min(_held(scene)[1], scene.useful)
    stays = _held(scene)[1] > world.floor and done < pace * (scene.now_s + 2 * world.move_s)
    return _first(
        scene,
        (done < pace * scene.now_s, _filled(scene)),
        (stays, (min(scene.can_hold, scene.useful - demand), demand)),
        (True, _spot_first(scene)),
        (True, _filled(scene)),
    )


def thrifty(scene: Scene, life_s: int = 7200) -> Wanted:
    world, memory, life = scene.world, scene.memory, Fraction(life_s)
    if not memory:
        memory.update(seconds=life, losses=Fraction(1), node_seconds=life, nodes=Fraction(1), held=Fraction(0))
    elif memory["held"]:
        lost = max(0, memory["held"] - scene.count(spot=True))
        memory["seconds"] += world.tick_s
        memory["node_seconds"] += world.tick_s * memory["held"]
        memory["losses"] += lost > 0
        memory["nodes"] += lost
    wanted = _thrifty(scene, memory)
    memory["held"] = Fraction(wanted[0])
    return wanted


def _thrifty(scene: Scene, memory: dict[str, Fraction]) -> Wanted:
    world, d, full = scene.world, scene.world.move_s, scene.useful
    stop = 0 if scene.divisible else world.restart_s
    per_second = memory["losses"] / memory["seconds"] * (stop + Fraction(world.saves_every_s, 2))
    per_second += memory["nodes"] / memory["seconds"] * world.launch_s / world.nodes
    reserve = d + max(d, world.tick_s) + 2 * world.saves_every_s + scene.rest_s * min(per_second, Fraction(1))
    lasts = min(memory["node_seconds"] / memory["nodes"], Fraction(scene.rest_s))
    spot, demand = _spot_first(scene)
    held_spot, held_demand = _held(scene)
    plenty = scene.slack_s >= reserve + (2 * d if held_demand > demand else 0)
    speeds = range(world.nodes + 1) if scene.divisible else world.speeds
    faster = Fraction(
        speeds[min(spot + demand, world.nodes)] - speeds[min(held_spot + demand, world.nodes)], speeds[-1]
    )
    worth_it = held_spot == 0 or faster * (lasts - world.launch_s) > stop
    all_there = min(scene.can_hold, full - min(world.floor, full))
    swapped = max(0, all_there + held_demand - full)
    return _first(
        scene,
        (plenty and spot + demand == 0, (spot, demand)),
        (plenty and not worth_it, (min(held_spot, spot), demand)),
        (plenty, (spot, demand)),
        (_swap_pays(scene, swapped, lasts, stop, reserve), (all_there, full - all_there)),
        (True, _filled(scene)),
    )


def _swap_pays(scene: Scene, swapped: int, lasts: Fraction, stop: int, reserve: Fraction) -> bool:
    world, tick = scene.world, scene.now_s // scene.world.tick_s
    rows = zip(world.machines, world.prices, strict=True)
    offers = [prices[tick] for machines, prices in rows if machines[tick] and prices[tick] < world.on_demand]
    cheapest = min(offers, default=min(prices[tick] for prices in world.prices))
    saves = swapped * (world.on_demand - cheapest) * lasts
    costs = world.on_demand * (scene.useful * 2 * stop + swapped * world.launch_s)
    left = scene.slack_s - 2 * stop - Fraction(swapped * world.launch_s, world.nodes)
    return swapped > 0 and saves > costs and left >= reserve


RULES: dict[str, Rule] = {
    "on-demand": on_demand,
    "spot": spot_only,
    "elastic-greedy": greedy,
    "elastic-uniform-progress": uniform_progress,
    "elastic-thrifty": thrifty,
}
