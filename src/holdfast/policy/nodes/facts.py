"""A job of several nodes at one moment: facts, for one job and for many windows at once.

Three kinds of work. A **rigid** gang works with all its nodes or not at all. An **elastic** one works with any number from
`min_nodes` up, as fast as `rates` says. In **divisible** work (sweeps, queues, batch inference) each node takes items by itself
and the others do not notice.

Whoever takes part in a gang must be launched (`launch_s`, each node for itself, while the others work on), and then all restart
together (`restart_s`, on every change of who takes part). So a gang that is ordered as a whole works after both, its
changeover.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum, IntEnum
from typing import Any

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Flags, Ints
from holdfast.policy.market.facts import LONGEST_S

__all__ = [
    "MOST_NODES",
    "Kind",
    "NodeChoice",
    "NodeDecision",
    "NodeFacts",
    "NodeJob",
    "NodeSituation",
    "NodeWhy",
    "floor_of",
    "scaling",
]

MOST_NODES = 1 << 12
_MOST_RATE = 1 << 23
_RATE_OF_ONE = 1000


class Kind(Enum):
    """How the nodes of a job hang together."""

    RIGID = "all nodes or none"
    ELASTIC = "any number of nodes between two bounds"
    DIVISIBLE = "items, each done by one node alone"


class NodeWhy(IntEnum):
    """The clause that decided."""

    ALL_SPOT = 0
    TOPPED_UP = 1
    LAST_MOMENT = 2
    TOO_LATE = 3
    WAIT = 4
    BEHIND = 5
    KEPT_ON_DEMAND = 6
    NOT_WORTH_A_RESTART = 7
    MARKET = 8
    """A market policy decided for the gang as a whole."""
    ON_DEMAND_ONLY = 9
    EXCHANGED = 10


def scaling(nodes: int, *, exponent: float = 1.0, overhead: float = 0.0) -> tuple[int, ...]:
    """Rates for `NodeJob.elastic`: n nodes do n^exponent / (1 + overhead x (n - 1)) times what one does, in thousandths."""
    if not (0 < exponent <= 1 and 0 <= overhead < 1):
        raise UsageError(
            f"work scales with an exponent in (0, 1] and an overhead in [0, 1), not with {exponent}, {overhead}"
        )
    speeds = (count**exponent / (1 + overhead * (count - 1)) for count in range(1, nodes + 1))
    return (0, *(round(_RATE_OF_ONE * speed) for speed in speeds))


def floor_of(floor: int | str, nodes: int) -> int:
    """An on-demand floor in nodes, from a number of nodes or a share such as "25%", rounded up."""
    try:
        count = -(-nodes * int(floor[:-1]) // 100) if isinstance(floor, str) and floor.endswith("%") else int(floor)
    except ValueError:
        raise UsageError(
            f"an on-demand floor is a number of nodes or a whole percentage such as 25%, not {floor!r}"
        ) from None
    if not 0 <= count <= nodes:
        raise UsageError(f"an on-demand floor lies between 0 and the job's {nodes} nodes, not at {floor!r}")
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJob:
    """What must be done by when, on how many nodes. Made by `rigid`, `elastic` and `divisible`. Seconds."""

    kind: Kind
    nodes: int
    """The most that work at once."""
    min_nodes: int
    """The fewest that work at all."""
    rates: tuple[int, ...]
    """What n nodes do in a second, for n from 0 to `nodes`, in any unit; it never falls."""
    total_work: int
    """In that unit times seconds."""
    deadline_s: int
    launch_s: int
    """From the order of a node until it can take part. Billed."""
    restart_s: int
    """From a change of who takes part until the gang works again: stop, rendezvous, restore. Divisible: of the new node
    alone. Billed."""
    max_lost_s: int = 0
    """The most working time that a preemption takes back; 0 where every notice is long enough to save in. Announced changes save
    first."""
    item_s: int = 0
    """Divisible: how long one node works on one item."""
    on_demand_floor: int = 0
    """Nodes that are on-demand whenever spot nodes are held."""

    def __post_init__(self) -> None:
        if not 0 < self.nodes <= MOST_NODES or not 0 < self.min_nodes <= self.nodes:
            raise UsageError(f"a job has 1 to {MOST_NODES} nodes and works with at least one of them")
        if len(self.rates) != self.nodes + 1 or self.rates[0] or not 0 < self.rates[1] <= self.rates[-1] <= _MOST_RATE:
            raise UsageError(f"there is a rate for 0 to {self.nodes} nodes, from 0 to at most {_MOST_RATE}")
        if list(self.rates) != sorted(self.rates):
            raise UsageError("more nodes never do less: rates do not fall")
        if not (0 < self.full_s <= LONGEST_S and 0 < self.deadline_s <= LONGEST_S):
            raise UsageError(f"work and deadline lie between 1 and {LONGEST_S} s")
        if not all(0 <= each <= LONGEST_S // 8 for each in (self.launch_s, self.restart_s, self.max_lost_s)):
            raise UsageError(f"launch, restart and lost work lie between 0 and {LONGEST_S // 8} s")
        if not 0 <= self.on_demand_floor <= self.nodes:
            raise UsageError(f"an on-demand floor lies between 0 and {self.nodes} nodes, not at {self.on_demand_floor}")

    @classmethod
    def rigid(
        cls,
        *,
        nodes: int,
        work_s: int,
        deadline_s: int,
        launch_s: int,
        restart_s: int,
        max_lost_s: int = 0,
        on_demand_floor: int = 0,
    ) -> NodeJob:
        """`work_s` on all nodes, or nothing."""
        return cls(
            kind=Kind.RIGID,
            nodes=nodes,
            min_nodes=nodes,
            rates=scaling(nodes),
            total_work=work_s * nodes * _RATE_OF_ONE,
            deadline_s=deadline_s,
            launch_s=launch_s,
            restart_s=restart_s,
            max_lost_s=max_lost_s,
            on_demand_floor=on_demand_floor,
        )

    @classmethod
    def elastic(
        cls,
        *,
        nodes: int,
        work_s: int,
        deadline_s: int,
        launch_s: int,
        restart_s: int,
        max_lost_s: int = 0,
        on_demand_floor: int = 0,
        min_nodes: int = 1,
        rates: tuple[int, ...] = (),
    ) -> NodeJob:
        """`work_s` on all nodes; on fewer it takes as much longer as `rates` says (linear unless given)."""
        law = rates or scaling(nodes)
        return cls(
            kind=Kind.ELASTIC,
            nodes=nodes,
            min_nodes=min_nodes,
            rates=law,
            total_work=work_s * law[-1],
            deadline_s=deadline_s,
            launch_s=launch_s,
            restart_s=restart_s,
            max_lost_s=max_lost_s,
            on_demand_floor=on_demand_floor,
        )

    @classmethod
    def divisible(
        cls,
        *,
        nodes: int,
        items: int,
        item_s: int,
        deadline_s: int,
        launch_s: int,
        restart_s: int,
        max_lost_s: int = 0,
        on_demand_floor: int = 0,
    ) -> NodeJob:
        """So many items, each of so many seconds on one node, on at most so many nodes."""
        return cls(
            kind=Kind.DIVISIBLE,
            nodes=nodes,
            min_nodes=1,
            rates=tuple(range(nodes + 1)),
            total_work=items * item_s,
            item_s=item_s,
            deadline_s=deadline_s,
            launch_s=launch_s,
            restart_s=restart_s,
            max_lost_s=max_lost_s,
            on_demand_floor=on_demand_floor,
        )

    @property
    def changeover_s(self) -> int:
        """From the order of a whole gang until it works."""
        return self.launch_s + self.restart_s

    @property
    def items(self) -> int:
        return self.total_work // self.item_s if self.item_s else 0

    @property
    def full_s(self) -> int:
        """How long the work takes on all nodes, ready, without interruption."""
        if self.kind is Kind.DIVISIBLE:
            return -(-self.items // self.nodes) * self.item_s
        return -(-self.total_work // self.rates[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSituation:
    """One tick of many windows, which share the job and the clock. Arrays have one element per window. What has just been preempted
    is not counted any more."""

    job: NodeJob
    now_s: int
    tick_s: int
    work_left: Ints
    rest_s: Ints
    """How long the rest takes on all nodes, ready, without interruption."""
    useful_nodes: Ints
    """More than so many have nothing to do: the job's nodes, or fewer when few items are left that still fit."""
    spot_ready: Ints
    spot_launching: Ints
    on_demand_ready: Ints
    on_demand_launching: Ints
    launch_left_s: Ints
    """Of the newest node; 0 where none is being launched."""
    restart_left_s: Ints
    spot_capacity: Ints
    """Spot nodes that could be held now: those that are, and those that could be had below the on-demand price."""
    spot_microusd_h: Ints
    """Price of one spot node in the cheapest pool that has some below the on-demand price; where none has, in the cheapest."""
    on_demand_microusd_h: int

    @property
    def spot(self) -> Ints:
        return self.spot_ready + self.spot_launching

    @property
    def on_demand(self) -> Ints:
        return self.on_demand_ready + self.on_demand_launching

    @property
    def slack_s(self) -> Ints:
        """Time that need not be worked, on all nodes."""
        return (self.job.deadline_s - self.now_s) - self.rest_s


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """Per window: nodes that are wanted, and the clause that decided, a `NodeWhy`."""

    spot: Ints
    on_demand: Ints
    why: Flags


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One job at one moment; names as in `NodeSituation`."""

    job: NodeJob
    now_s: int
    tick_s: int
    work_left: int
    rest_s: int
    useful_nodes: int
    spot_ready: int
    spot_launching: int
    on_demand_ready: int
    on_demand_launching: int
    launch_left_s: int
    restart_left_s: int
    spot_capacity: int
    spot_microusd_h: int
    on_demand_microusd_h: int

    @classmethod
    def of(cls, situation: NodeSituation, window: int) -> NodeFacts:
        """One window of a situation."""
        facts: dict[str, Any] = {}
        for field in fields(situation):
            value = getattr(situation, field.name)
            facts[field.name] = int(value[window]) if isinstance(value, np.ndarray) else value
        return cls(**facts)

    def as_situation(self) -> NodeSituation:
        """The same as arrays of length one."""
        shared = {"job", "now_s", "tick_s", "on_demand_microusd_h"}
        arrays: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            arrays[field.name] = value if field.name in shared else np.array([value], np.int64)
        return NodeSituation(**arrays)


@dataclass(frozen=True, slots=True)
class NodeDecision:
    """What to hold until the next tick, and why."""

    spot: int
    on_demand: int
    reasons: tuple[str, ...]
