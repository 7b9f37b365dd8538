"""Jobs of several nodes again, slowly: second by second, node by node, in fractions, with all rules written down anew.

Nothing of the simulator and no policy is used here; plain facts come in and go out. The simulator is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

DEMAND = -2
Wanted = tuple[int, int]
"""Spot nodes, on-demand nodes."""


@dataclass(frozen=True)
class NodesWorld:
    """One window. Rows are pools, columns ticks from the window's start."""

    kind: str
    tick_s: int
    machines: tuple[tuple[int, ...], ...]
    prices: tuple[tuple[int, ...], ...]
    on_demand: int
    nodes: int
    fewest: int
    speeds: tuple[int, ...]
    """Of 0, 1, 2 ... nodes, in thousandths of one."""
    work_s: int
    """On all nodes. Divisible: unused."""
    items: int
    item_s: int
    deadline_s: int
    launch_s: int
    restart_s: int
    saves_every_s: int
    floor: int = 0
    horizon_s: int = 0
    budget: int | None = None

    @property
    def ends_s(self) -> int:
        return self.horizon_s or self.deadline_s

    @property
    def move_s(self) -> int:
        return self.launch_s + self.restart_s


@dataclass
class Node:
    number: int
    place: int
    ordered_s: int
    joined: bool = False
    item_left: int = 0
    in_hand: int = 0


@dataclass
class NodesEnding:
    """What became of the window."""

    spot: Fraction = Fraction(0)
    on_demand: Fraction = Fraction(0)
    finish_s: int = -1
    stopped: bool = False
    left: Fraction = Fraction(0)
    worked_node_s: int = 0
    lost_node_s: int = 0
    changeover_node_s: int = 0
    idle_node_s: int = 0
    waiting_s: int = 0
    spot_node_s: int = 0
    on_demand_node_s: int = 0
    preemptions: int = 0
    restarts: int = 0
    spot_launches: int = 0
    on_demand_launches: int = 0
    decisions: list[Wanted] = field(default_factory=list)


@dataclass
class Scene:
    """The window at one second: what a rule may look at."""

    world: NodesWorld
    now_s: int = 0
    nodes: list[Node] = field(default_factory=list)
    left: Fraction = Fraction(0)
    """Gang: work, in node-seconds of a lone node."""
    fresh: int = 0
    given_back: list[int] = field(default_factory=list)
    restart_s: int = 0
    unsaved: int = 0
    changed: bool = False
    begun: int = 0
    can_hold: int = 0
    memory: dict[str, Fraction] = field(default_factory=dict)

    @property
    def divisible(self) -> bool:
        return self.world.kind == "divisible"

    @property
    def members(self) -> list[Node]:
        return [node for node in self.nodes if node.joined]

    @property
    def able(self) -> bool:
        return len(self.members) >= self.world.fewest

    def count(self, *, spot: bool, joined: bool | None = None) -> int:
        return sum((n.place != DEMAND) == spot and joined in (None, n.joined) for n in self.nodes)

    @property
    def speed(self) -> Fraction:
        return Fraction(self.world.speeds[len(self.members)], 1000) if self.able else Fraction(0)

    @property
    def rest_s(self) -> int:
        """On all nodes, ready now, nothing lost."""
        world = self.world
        if not self.divisible:
            return ceil(self.left * 1000 / world.speeds[-1])
        free_at = sorted([n.item_left for n in self.nodes if n.item_left] + self.given_back, reverse=True)
        free_at += [0] * (world.nodes - len(free_at))
        for _ in range(self.fresh):
            free_at.sort()
            free_at[0] += world.item_s
        return max(free_at)

    @property
    def slack_s(self) -> int:
        return self.world.deadline_s - self.now_s - self.rest_s

    @property
    def launch_left_s(self) -> int:
        """Until the last node that is ordered joins."""
        takes = self.world.move_s if self.divisible else self.world.launch_s
        return max((node.ordered_s + takes - self.now_s for node in self.nodes if not node.joined), default=0)

    @property
    def useful(self) -> int:
        """Nodes that there is something to do for."""
        world = self.world
        if not self.divisible:
            return world.nodes
        time_s = world.deadline_s - self.now_s

        def fits(in_s: int) -> int:
            fresh = self.fresh if world.item_s <= in_s else 0
            return fresh + sum(0 < left <= in_s for left in self.given_back) + sum(n.item_left > 0 for n in self.nodes)

        return min(world.nodes, max(fits(time_s - world.move_s), min(len(self.nodes), fits(time_s))))


Rule = Callable[[Scene], Wanted]


def play_nodes(world: NodesWorld, rule: Rule) -> NodesEnding:
    end, scene = NodesEnding(), Scene(world)
    scene.left = Fraction(world.work_s * world.speeds[-1], 1000)
    scene.fresh = world.items if scene.divisible else 0
    for now in range(world.ends_s):
        scene.now_s, tick = now, now // world.tick_s
        if now % world.tick_s == 0:
            _market(scene, end, tick)
            _join(scene)
            wanted = _ask(scene, rule, tick)
            end.decisions.append(wanted)
            _follow(scene, end, wanted, tick)
        _join(scene)
        if scene.divisible:
            _hand_out(scene, end)
        elif scene.changed:
            scene.changed = False
            scene.begun += scene.able
        if not _pay(scene, end, tick):
            end.stopped = True
            break
        if _work_a_second(scene, end):
            end.finish_s = now + 1
            break
    items_left = scene.fresh * world.item_s + sum(scene.given_back) + sum(node.item_left for node in scene.nodes)
    end.left = Fraction(items_left) if scene.divisible else scene.left
    if not scene.divisible:
        end.restarts = max(0, scene.begun - 1)
    return end


def _market(scene: Scene, end: NodesEnding, tick: int) -> None:
    """Pools that have shrunk take their newest nodes back."""
    before = len(scene.members)
    hit = False
    for pool, row in enumerate(scene.world.machines):
        while sum(node.place == pool for node in scene.nodes) > row[tick]:
            node = _newest(scene, lambda node, pool=pool: node.place == pool)  # type: ignore[misc]
            end.preemptions += 1
            hit |= node.joined
            if node.item_left:
                lost = node.in_hand % scene.world.saves_every_s if scene.world.saves_every_s else 0
                end.lost_node_s += lost
                node.item_left += lost
            _remove(scene, node)
    if hit and not scene.divisible:
        end.lost_node_s += scene.unsaved * before
        scene.left += scene.unsaved * Fraction(scene.world.speeds[before], 1000)
        _change(scene)


def _newest(scene: Scene, among: Callable[[Node], bool]) -> Node:
    return max((node for node in scene.nodes if among(node)), key=lambda node: (node.ordered_s, node.number))


def _remove(scene: Scene, node: Node) -> None:
    scene.nodes.remove(node)
    if node.item_left:
        scene.given_back.append(node.item_left)


def _change(scene: Scene) -> None:
    scene.changed, scene.unsaved, scene.restart_s = True, 0, scene.world.restart_s


def _join(scene: Scene) -> None:
    takes = scene.world.move_s if scene.divisible else scene.world.launch_s
    for node in scene.nodes:
        if not node.joined and scene.now_s >= node.ordered_s + takes:
            node.joined = True
            _change(scene)


def _room(scene: Scene, pool: int, tick: int) -> int:
    world = scene.world
    if world.prices[pool][tick] >= world.on_demand:
        return 0
    return world.machines[pool][tick] - sum(node.place == pool for node in scene.nodes)


def _ask(scene: Scene, rule: Rule, tick: int) -> Wanted:
    room = sum(_room(scene, pool, tick) for pool in range(len(scene.world.machines)))
    scene.can_hold = min(scene.world.nodes, room + scene.count(spot=True))
    return rule(scene)


def _follow(scene: Scene, end: NodesEnding, wanted: Wanted, tick: int) -> None:
    world = scene.world
    for is_spot, count in ((True, wanted[0]), (False, wanted[1])):
        while scene.count(spot=is_spot) > count:
            node = _newest(scene, lambda node, is_spot=is_spot: (node.place != DEMAND) == is_spot)  # type: ignore[misc]
            _remove(scene, node)
            if node.joined:
                _change(scene)
    for _ in range(wanted[0] - scene.count(spot=True)):
        pools = [pool for pool in range(len(world.machines)) if _room(scene, pool, tick) > 0]
        _order(scene, min(pools, key=lambda pool: (world.prices[pool][tick], pool)))
        end.spot_launches += 1
    for _ in range(wanted[1] - scene.count(spot=False)):
        _order(scene, DEMAND)
        end.on_demand_launches += 1


def _order(scene: Scene, place: int) -> None:
    taken = {node.number for node in scene.nodes}
    number = min(set(range(scene.world.nodes)) - taken)
    scene.nodes.append(Node(number, place, scene.now_s))


def _hand_out(scene: Scene, end: NodesEnding) -> None:
    time_s = scene.world.deadline_s - scene.now_s
    for node in sorted(scene.members, key=lambda node: node.number):
        if node.item_left:
            continue
        node.in_hand = 0
        fitting = [left for left in scene.given_back if left <= time_s]
        if fitting:
            node.item_left = max(fitting)
            scene.given_back.remove(node.item_left)
            end.restarts += 1
        elif scene.fresh and scene.world.item_s <= time_s:
            node.item_left = scene.world.item_s
            scene.fresh -= 1
        else:
            scene.nodes.remove(node)


def _pay(scene: Scene, end: NodesEnding, tick: int) -> bool:
    """The bill of this second; False where the budget does not hold it."""
    world = scene.world
    spot = sum(
        (Fraction(world.prices[node.place][tick], 3600) for node in scene.nodes if node.place != DEMAND), Fraction(0)
    )
    demand = Fraction(world.on_demand * scene.count(spot=False), 3600)
    if world.budget is not None and spot + demand and end.spot + end.on_demand + spot + demand > world.budget:
        return False
    end.spot, end.on_demand = end.spot + spot, end.on_demand + demand
    end.spot_node_s += scene.count(spot=True)
    end.on_demand_node_s += scene.count(spot=False)
    end.waiting_s += not scene.nodes
    return True


def _work_a_second(scene: Scene, end: NodesEnding) -> bool:
    """True where nothing is left."""
    launching = len(scene.nodes) - len(scene.members)
    end.changeover_node_s += launching
    if scene.divisible:
        for node in scene.members:
            node.item_left -= 1
            node.in_hand += 1
            end.worked_node_s += 1
        return not (scene.fresh or scene.given_back or any(node.item_left for node in scene.nodes))
    if not scene.able:
        end.idle_node_s += len(scene.members)
    elif scene.restart_s:
        scene.restart_s -= 1
        end.changeover_node_s += len(scene.members)
    else:
        scene.left = max(Fraction(0), scene.left - scene.speed)
        end.worked_node_s += len(scene.members)
        every = scene.world.saves_every_s
        scene.unsaved = (scene.unsaved + 1) % every if every else 0
    return scene.left == 0
