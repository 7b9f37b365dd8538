"""The work of a gang, rigid or elastic: all members work together, as fast as their number says, and restart together.

Whenever who takes part changes, the gang restarts, if it still has enough members to work. A change that is announced (a node
joins, or is given up) saves first. A preemption takes back what was done since the last save: one save per `max_lost_s` of
working time. Members of a gang that is too small are billed for nothing.
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import Bools, Ints
from holdfast.policy.nodes.facts import NodeJob
from holdfast.simulate.nodes.books import Books
from holdfast.simulate.nodes.fleet import Fleet
from holdfast.simulate.nodes.purse import Purse

__all__ = ["GangWork"]


class GangWork(Books):
    """What is left in every window, and where the time went."""

    def __init__(self, job: NodeJob, fleet: Fleet, purse: Purse) -> None:
        self.job, self.fleet, self.purse = job, fleet, purse
        windows = fleet.place.shape[1]
        super().__init__(windows)
        self.rates = np.array(job.rates, np.int64)
        self.joins_after_s = job.launch_s
        self.left: Ints = np.full(windows, job.total_work, np.int64)
        self.changed: Bools = np.zeros(windows, np.bool_)
        self.unsaved_s, self.to_restart_s = np.zeros((2, windows), np.int64)
        self.begun: Ints = np.zeros(windows, np.int64)

    @property
    def restart_left_s(self) -> Ints:
        left_s: Ints = np.where(self.fleet.member.sum(axis=0) >= self.job.min_nodes, self.to_restart_s, 0)
        return left_s

    @property
    def restarts(self) -> Ints:
        return np.maximum(self.begun - 1, 0)

    def rest_s(self) -> Ints:
        whole_s: Ints = -(-self.left // self.rates[-1])
        return whole_s

    def useful_nodes(self, now_s: int) -> Ints:
        """All, while there is work."""
        return np.where(self.over, 0, self.job.nodes)

    def join(self, new: Bools) -> None:
        self._change(new)

    def give_up(self, gone: Bools) -> None:
        """Announced, so it saves. Called before they go."""
        self._change(gone & self.fleet.member)

    def lose(self, gone: Bools) -> None:
        """Preempted. Called before they go."""
        member = self.fleet.member
        hit = gone & member
        lost_s = np.where(hit.any(axis=0), self.unsaved_s, 0)
        if lost_s.any():
            nodes = member.sum(axis=0)
            self.lost_node_s += lost_s * nodes
            self.left = self.left + lost_s * self.rates[nodes]
        self._change(hit)

    def _change(self, nodes: Bools) -> None:
        where = nodes.any(axis=0)
        self.changed |= where
        self.to_restart_s = np.where(where, self.job.restart_s, self.to_restart_s)
        self.unsaved_s = np.where(where, 0, self.unsaved_s)

    def run(self, begin_s: int, length_s: int, prices: Ints) -> None:
        """A stretch in which nothing but the work itself changes."""
        members = self.fleet.member.sum(axis=0)
        able = members >= self.job.min_nodes
        self.begun += self.changed & able
        self.changed[:] = False
        rate = np.where(able, self.rates[members], 0)
        restart_s = np.where(able, np.minimum(self.to_restart_s, length_s), 0)
        enough_s = restart_s - (-self.left // np.maximum(rate, 1))
        wanted_s = np.where(able, np.minimum(enough_s, length_s), length_s)
        load = self.purse.load(self.fleet, prices)
        run_s = self.purse.paid_s(load, wanted_s)
        restart_s = np.minimum(restart_s, run_s)
        worked_s = np.where(able, run_s - restart_s, 0)
        self.purse.pay(load, run_s)
        self.worked_node_s += members * worked_s
        self.changeover_node_s += (load.nodes - members) * run_s + members * restart_s
        self.idle_node_s += np.where(able, 0, members * run_s)
        self.waiting_s += np.where((load.nodes == 0) & ~self.over, length_s, 0)
        self.left = np.maximum(self.left - rate * worked_s, 0)
        self.to_restart_s = self.to_restart_s - restart_s
        if self.job.max_lost_s:
            self.unsaved_s = (self.unsaved_s + worked_s) % self.job.max_lost_s
        self._end(begin_s + run_s, run_s < wanted_s)

    def _end(self, at_s: Ints, unpaid: Bools) -> None:
        ended = self.close(at_s, self.left == 0, unpaid)
        if ended.any():
            self.fleet.drop(np.broadcast_to(ended, self.fleet.place.shape))
