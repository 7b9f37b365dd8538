"""torch's DynamicRendezvousHandler with its state in the object store, and nothing of it bound to one node.

torch does the rounds: join, last call, ranks, heartbeats, close. What is ours:
  - every agent has a TCPStore of its own, whose port is part of its name in the state; a round uses that of its rank 0
    (round_store.py), and a fresh one for the workers of every round;
  - an agent that has gone, or that cannot reach the store, is news to the others as a new one is: `num_nodes_waiting`, which
    torchrun's agent asks ten times a second, speaks of both, and what it asks for costs no restart;
  - leaving is said: an agent that is told to go takes itself out, so that the others need not miss its heartbeats first, and one
    whose machine has got a notice does not come back (departure.py);
  - closed means that a job has ended, not that its id is used up.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import sys
import time
import weakref
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    _Action,
    _BackendRendezvousStateHolder,
    _DistributedRendezvousOpExecutor,
    _NodeDesc,
    _RendezvousContext,
)

from holdfast.core.clock import SystemClock
from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.train.elastic.backend import ObjectStoreBackend
from holdfast.train.elastic.departure import Departure
from holdfast.train.elastic.options import Options, open_backend, own_address, read_options
from holdfast.train.elastic.round_store import RoundLost, RoundStore

__all__ = ["ElasticHandler", "make_handler"]

logger = logging.getLogger(__name__)

_PORT_BITS = 16
_NONCE_BITS = 46
"""With the port: 62 bits, what any reader of JSON holds in an integer."""
_LEAVE_S = 5.0
_ANSWER = timedelta(seconds=20)
_LONGEST_PAUSE_S = 60.0


def make_handler(parameters: RendezvousParameters) -> ElasticHandler:
    """What `--rdzv-backend=holdfast` makes. Raises UsageError, RendezvousError, and what the store raises."""
    options = read_options(parameters, os.environ)
    backend = open_backend(options, parameters.run_id)
    _wait_for_the_end(backend, options)
    address = parameters.local_addr or own_address()
    server = TCPStore(address, 0, is_master=True, multi_tenant=True)
    node = _NodeDesc(address, os.getpid(), secrets.randbits(_NONCE_BITS) << _PORT_BITS | server.port)
    handler = ElasticHandler(node, options, parameters, backend, server, Departure(os.environ, SystemClock()))
    atexit.register(_leave_at_exit, weakref.ref(handler))
    return handler


def _wait_for_the_end(backend: ObjectStoreBackend, options: Options) -> None:
    """Begin a new life of the job if the old one is over. While nodes of an ended one are still there, wait for them to leave."""
    give_up_s = (
        time.monotonic() + 2 * options.dead_after.total_seconds() + options.settings.timeout.close.total_seconds()
    )
    while backend.begin(datetime.now(UTC), options.dead_after).closed:
        if time.monotonic() > give_up_s:
            raise RendezvousClosedError(
                f"the job {options.settings.run_id!r} at {options.url} has ended, and nodes of it are still there. Start "
                "again when they have left, or use another --rdzv-id"
            )
        time.sleep(1.0)


def _leave_at_exit(handler: weakref.ref[ElasticHandler]) -> None:
    present = handler()
    if present is not None:
        present.leave()


class ElasticHandler(DynamicRendezvousHandler):
    """One agent's part in the rendezvous. Thread safety: as torch's: the agent's thread, and the heartbeats' own."""

    def __init__(
        self,
        node: _NodeDesc,
        options: Options,
        parameters: RendezvousParameters,
        backend: ObjectStoreBackend,
        server: TCPStore,
        departure: Departure,
    ) -> None:
        self._holder = _BackendRendezvousStateHolder(backend, options.settings)
        self._holder._cache_duration = options.poll_s  # type: ignore[assignment]  # torch compares it, in seconds
        super().__init__(node, options.settings, parameters.backend, server, self._holder)
        self._options, self._server, self._departure = options, server, departure
        self._executor = _Operations(node, self._holder, options)
        self._op_executor = self._executor
        self._round_store: RoundStore | None = None
        self._members: dict[_NodeDesc, int] = {}
        self._round = -1
        self._has_left = False

    def next_rendezvous(self) -> RendezvousInfo:
        """As torch's, and again when the round breaks before it is under way: an agent of it died just now, or cannot be reached.

        Who fails at that more than once stays away for a while, longer each time, so that a node that reaches the store and not
        the other nodes does not keep them from working. A node that is about to go leaves with exit code 75 instead.
        """
        give_up_s, pause_s = time.monotonic() + self._settings.timeout.join.total_seconds(), 0.0
        self._has_left = False
        while True:
            if self._departure.is_near:
                logger.warning(
                    "This machine is going: the node leaves the job '%s' to the others.", self._settings.run_id
                )
                raise SystemExit(EXIT_PREEMPTED)
            # torch keeps both from round to round: the address of a rank 0 that has gone, the keys of workers that have ended.
            self._bootstrap_store_info = self._shared_tcp_store_server = None
            try:
                info = super().next_rendezvous()
            except (RendezvousClosedError, RendezvousGracefulExitError):
                self._end_with_the_job()
            except RendezvousConnectionError as error:
                if time.monotonic() > give_up_s:
                    raise RendezvousTimeoutError(f"no round could be formed in time: {error}") from error
                logger.warning("The rendezvous '%s' begins anew: %s", self._settings.run_id, error)
                with suppress(RendezvousError):
                    self._withdraw()
                time.sleep(pause_s)
                pause_s = min(2 * pause_s + 1, _LONGEST_PAUSE_S)
            else:
                assert self._round_store is not None
                self._round_store.is_under_way = True
                return info

    def num_nodes_waiting(self) -> int:
        """New nodes, and those of this round that have gone. While the store does not answer: nobody, until this node's own
        heartbeats are so old that the others have given it up; then the workers must stop, and it joins again when it can."""
        if self._round_store is not None and self._round_store.is_lost:
            return 1
        try:
            waiting = super().num_nodes_waiting()
        except RendezvousError as error:
            silent_s = time.monotonic() - self._holder._last_sync_time
            if silent_s <= self._options.dead_after.total_seconds():
                return 0
            logger.warning("Nothing heard of the rendezvous for %.0f s, the workers are stopped: %s", silent_s, error)
            return 1
        return waiting + self._gone()

    def shutdown(self) -> bool:
        """torch's agent calls this when its workers have finished, when they have failed for good, and when the agent itself has
        failed, then with the error under way. Only the first two end the job for all; the last is this node's affair."""
        error = sys.exc_info()[1]
        closed = True
        if error is None or (isinstance(error, ChildFailedError) and not self._departure.is_near):
            self._executor.has_finished = error is None
            closed = super().shutdown()
        self.leave()
        return closed

    def leave(self) -> None:
        """Take this node out of the state, so that the others need not wait until its heartbeats are missed."""
        if self._has_left:
            return
        self._has_left = True
        with suppress(RendezvousError):
            self._withdraw()
        self._departure.close()

    def _withdraw(self) -> None:
        self._stop_heartbeats()
        self._op_executor.run(_LeaveOperation(), time.monotonic() + _LEAVE_S)

    def _get_world(self) -> tuple[int, int]:
        """Called by torch when the round is complete. From here on the round is what the state says now: heartbeats run already,
        and may bring another one at any time."""
        state = self._state_holder.state
        self._members, self._round = dict(state.participants), state.round
        if self._this_node not in self._members:
            raise RoundLost("this node was not heard of in time, and the others have given it up")
        return self._members[self._this_node], len(self._members)

    def _get_store(self) -> Store:
        """Called by torch right after `_get_world`."""
        host = next((node for node, rank in self._members.items() if rank == 0), None)
        if host is None:
            raise RoundLost("rank 0's agent has gone")
        inner: Store = self._server
        if host != self._this_node:
            port = host.local_id & ((1 << _PORT_BITS) - 1)
            try:
                inner = TCPStore(host.addr, port, is_master=False, wait_for_workers=False, timeout=_ANSWER)
            except RuntimeError as error:
                raise RoundLost(f"rank 0's agent cannot be reached at {host.addr}, port {port}: {error}") from error
        prefix = f"holdfast/{self._settings.run_id}/{self._round}"
        self._round_store = RoundStore(PrefixStore(prefix, inner), self._is_whole)
        return self._round_store  # type: ignore[return-value]

    def _is_whole(self) -> bool:
        with suppress(RendezvousError), self._heartbeat_lock:
            self._state_holder.sync()
        return not self._gone()

    def _gone(self) -> int:
        """How many agents of this round have gone; in an ended job nobody is missed."""
        state = self._state_holder.state
        if state.closed:
            return 0
        return len(self._members.keys() - state.participants.keys()) if state.round == self._round else 1

    def _end_with_the_job(self) -> None:
        """The job has ended while this node waited for a round."""
        if getattr(self._state_holder.state, "finished", False):
            logger.warning("The job '%s' has finished; this node has nothing to do.", self._settings.run_id)
            raise SystemExit(0)
        raise RendezvousClosedError(
            f"the job {self._settings.run_id!r} at {self._options.url} has been ended by a node whose workers have failed for "
            "good; its output says why. A new start, when all nodes have ended, goes on from the newest checkpoint"
        ) from None


class _Operations(_DistributedRendezvousOpExecutor):
    """torch's, with a shorter last call where a job re-forms, and with the word that it has finished."""

    def __init__(self, node: _NodeDesc, holder: _BackendRendezvousStateHolder, options: Options) -> None:
        super().__init__(node, holder, options.settings)
        self._regroup = options.regroup
        self.has_finished = False

    def _add_to_participants(self) -> None:
        before = self._state.deadline
        super()._add_to_participants()
        state = self._state
        if state.deadline not in (None, before) and state.round > getattr(state, "first_round", 0):
            state.deadline = datetime.now(UTC) + self._regroup

    def _mark_rendezvous_closed(self) -> None:
        super()._mark_rendezvous_closed()
        vars(self._state)["finished"] = self.has_finished


class _LeaveOperation:
    """Out of everything that this node is in."""

    def __call__(self, context: _RendezvousContext, deadline_s: float) -> _Action:
        node, state = context.node, context.state
        if time.monotonic() > deadline_s:
            return _Action.ERROR_TIMEOUT
        if node in state.participants:
            return _Action.REMOVE_FROM_PARTICIPANTS
        if node in state.wait_list:
            return _Action.REMOVE_FROM_WAIT_LIST
        if node in state.redundancy_list:
            return _Action.REMOVE_FROM_REDUNDANCY_LIST
        return _Action.FINISH
