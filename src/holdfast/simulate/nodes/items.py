"""Divisible work: items of one length, each done by one node alone. Sweeps, queues, batch inference.

A node that is ready takes an item: of those that were begun and given back the longest that still fits before the deadline,
else a fresh one if that fits; ready nodes are served by number. A node for which there is none ends at that second. A preempted
node's item is given back without what was done on it since its last save: one save per `max_lost_s` of working time on an item,
by one node. A node that is given up saves first.

Fresh items are begun only when no begun one is there to go on with, so at most as many are begun and not done as the job has
nodes.
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import NOTHING, Bools, Ints
from holdfast.policy.nodes.facts import NodeJob
from holdfast.simulate.nodes.books import Books
from holdfast.simulate.nodes.fleet import Fleet
from holdfast.simulate.nodes.purse import Purse

__all__ = ["ItemWork"]


class ItemWork(Books):
    """The items of every window, and where the time went. Slots are those of the fleet."""

    def __init__(self, job: NodeJob, fleet: Fleet, purse: Purse) -> None:
        self.job, self.fleet, self.purse = job, fleet, purse
        slots, windows = fleet.place.shape
        super().__init__(windows)
        self.joins_after_s = job.changeover_s
        self.fresh: Ints = np.full(windows, job.items, np.int64)
        self.item_s: Ints = np.zeros((slots, windows), np.int64)
        """What is left of the item that a node has in hand; 0: none."""
        self.given_back_s: Ints = np.zeros((slots, windows), np.int64)
        """What is left of items that were begun and that no node has; the longest first, then zeros."""
        self.in_hand_s: Ints = np.zeros((slots, windows), np.int64)
        """Working time of this node on this item."""
        self.restarts, self.restart_left_s = np.zeros((2, windows), np.int64)

    @property
    def left(self) -> Ints:
        left_s: Ints = self.fresh * self.job.item_s + self.item_s.sum(axis=0) + self.given_back_s.sum(axis=0)
        return left_s

    def rest_s(self) -> Ints:
        """The time that all nodes would take, each served as it gets free. Begun items are at most one per node and no longer than
        a fresh one, so fresh ones go round: one more for every node, the shortest of the begun ones first."""
        begun_s = np.sort(np.concatenate([self.item_s, self.given_back_s]), axis=0)[-self.job.nodes :]
        rounds, more = np.divmod(self.fresh, self.job.nodes)
        last = np.where(more > 0, more - 1, self.job.nodes - 1)
        in_hand_s: Ints = np.take_along_axis(begun_s, last[None, :], axis=0)[0]
        rest_s: Ints = in_hand_s + (rounds + (more > 0)) * self.job.item_s
        return rest_s

    def useful_nodes(self, now_s: int) -> Ints:
        """As many as there are items that a new node could still do, or of the nodes that are there, could be doing."""
        now: Ints = self._fitting(self.job.deadline_s - now_s)
        later: Ints = self._fitting(self.job.deadline_s - now_s - self.job.changeover_s)
        held = (self.fleet.place != NOTHING).sum(axis=0)
        useful: Ints = np.minimum(self.job.nodes, np.maximum(later, np.minimum(now, held)))
        return useful

    def _fitting(self, time_s: int) -> Ints:
        """Items in hand, and those that take at most so long."""
        waiting = ((self.given_back_s > 0) & (self.given_back_s <= time_s)).sum(axis=0)
        fresh = self.fresh if self.job.item_s <= time_s else np.zeros_like(self.fresh)
        in_hand = (self.item_s > 0).sum(axis=0)
        return np.where(self.over, 0, in_hand + waiting + fresh)

    def join(self, new: Bools) -> None:
        """A node that is ready takes its item when the stretch runs."""

    def give_up(self, gone: Bools) -> None:
        self._give_back(gone & (self.item_s > 0))

    def lose(self, gone: Bools) -> None:
        hit = gone & (self.item_s > 0)
        if self.job.max_lost_s and hit.any():
            lost_s = np.where(hit, self.in_hand_s % self.job.max_lost_s, 0)
            self.lost_node_s += lost_s.sum(axis=0)
            self.item_s += lost_s
        self._give_back(hit)

    def _give_back(self, hit: Bools) -> None:
        if hit.any():
            both = np.concatenate([self.given_back_s, np.where(hit, self.item_s, 0)])
            self.given_back_s = np.ascontiguousarray(-np.sort(-both, axis=0)[: self.job.nodes])
            self.item_s[hit] = 0
            self.in_hand_s[hit] = 0

    def _hand_out(self, left_s: Ints, where: Bools) -> None:
        """Items for ready nodes that have none; `left_s` is the time to the deadline. Nodes that get none end."""
        free = self.fleet.member & (self.item_s == 0) & where
        if not free.any():
            return
        number = free.cumsum(axis=0) - 1
        if self.given_back_s.any():
            # The longest come first, so those that do not fit any more lie before those that do.
            tight = (self.given_back_s > left_s).sum(axis=0)
            fit = (self.given_back_s > 0).sum(axis=0) - tight
            taken = np.minimum(free.sum(axis=0), fit)
            takes = free & (number < taken)
            place = np.clip(number + tight, 0, self.job.nodes - 1)
            self.item_s = np.where(takes, np.take_along_axis(self.given_back_s, place, axis=0), self.item_s)
            slot = np.arange(self.job.nodes)[:, None]
            remain = np.where((slot >= tight) & (slot < tight + taken), 0, self.given_back_s)
            self.given_back_s = np.ascontiguousarray(-np.sort(-remain, axis=0))
            self.restarts += taken
            free &= ~takes
            number = number - taken
        taken = np.where(self.job.item_s <= left_s, np.minimum(free.sum(axis=0), self.fresh), 0)
        takes = free & (number < taken)
        self.item_s = np.where(takes, self.job.item_s, self.item_s)
        self.fresh = self.fresh - taken
        self.fleet.drop(free & ~takes)

    def run(self, begin_s: int, length_s: int, prices: Ints) -> None:
        """From one end of an item to the next, in all windows at once, until the stretch is over in all of them."""
        elapsed_s = np.where(self.over, length_s, 0)
        while True:
            # At the end of the stretch the market may move first.
            self._hand_out(self.job.deadline_s - begin_s - elapsed_s, elapsed_s < length_s)
            working = self.item_s > 0
            until_s = np.where(working, self.item_s, length_s).min(axis=0)
            wanted_s = np.minimum(until_s, length_s - elapsed_s)
            load = self.purse.load(self.fleet, prices)
            run_s = self.purse.paid_s(load, wanted_s)
            self.purse.pay(load, run_s)
            nodes = working.sum(axis=0)
            self.worked_node_s += nodes * run_s
            self.changeover_node_s += (load.nodes - nodes) * run_s
            self.waiting_s += np.where(load.nodes == 0, run_s, 0)
            self.item_s -= working * run_s
            self.in_hand_s = np.where(self.item_s > 0, self.in_hand_s + run_s, 0)
            elapsed_s += run_s
            self._end(begin_s + elapsed_s, run_s < wanted_s)
            elapsed_s = np.where(self.over, length_s, elapsed_s)
            if (elapsed_s >= length_s).all():
                return

    def _end(self, at_s: Ints, unpaid: Bools) -> None:
        ended = self.close(at_s, self.left == 0, unpaid)
        if ended.any():
            # What was begun stays begun: a stop is announced, so it saves.
            self.give_up(np.broadcast_to(ended, self.fleet.place.shape))
            self.fleet.drop(np.broadcast_to(ended, self.fleet.place.shape))
