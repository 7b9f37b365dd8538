"""Agents under torchrun that are killed, stopped, cut off and started again: the job shrinks, grows, trains every sample once."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import network, why_not
from nodes import STEPS, Cluster, Node, eventually
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousInfo, RendezvousParameters

from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.train.elastic.handler import ElasticHandler, make_handler

CONF = {"keep_alive_interval": "0.5", "keep_alive_max_attempt": "6", "last_call_timeout": "1", "regroup_timeout": "0.3"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    its = Cluster(tmp_path)
    try:
        yield its
    finally:
        its.end()


def test_the_rendezvous_host_dies_and_comes_back(cluster: Cluster) -> None:
    """Two nodes. That with rank 0, whose agent the others talk through, is gone at once; the other goes on, and then both."""
    cluster.pace_alone_s = 1.0
    for name in "ab":
        cluster.node(name).start()
    before = cluster.until_running(2)
    lost = cluster.host()
    lost.kill()
    alone = cluster.until_running(1, before)
    lost.start()
    cluster.until_running(2, alone)
    cluster.assert_finished()


def _strike(rng: random.Random, cluster: Cluster, victim: Node) -> None:
    match rng.choice(["machine", "machine", "agent", "frozen", "told", "noticed"]):
        case "machine":
            victim.kill()
        case "agent":  # its worker lives on, until the others go on without it
            victim.signal(signal.SIGKILL, agent_only=True)
            eventually(lambda: not victim.workers(), cluster.said)
            victim.kill()
        case "frozen":
            victim.signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 8.0))
            victim.signal(signal.SIGCONT)
        case "told":
            victim.signal(signal.SIGTERM, agent_only=True)
            eventually(lambda: victim.code is not None, cluster.said)
        case "noticed":  # all workers leave at one step; its agent does not come back, the others do
            victim.notice.write_text("40s")
            eventually(lambda: victim.code is not None, cluster.said)
            victim.notice.unlink()
            assert victim.code in (EXIT_PREEMPTED, 0), cluster.said()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_random_strikes(cluster: Cluster, seed: int) -> None:
    """Three nodes; each strike hits a random one, every other time that of rank 0. They are started again, sooner or later."""
    rng = random.Random(seed)
    cluster.pace_s = 0.25
    for name in "abc":
        cluster.node(name).start()
    cluster.until_running(3)
    for number in range(8):
        alive = [node for node in cluster.nodes.values() if node.code is None]
        if cluster.progress()[2] >= STEPS - 5 or not alive:
            break
        host = cluster.host()
        _strike(rng, cluster, host if number % 2 and host in alive else rng.choice(alive))
        time.sleep(rng.uniform(0.0, 12.0))
        for node in cluster.nodes.values():
            if node.code is not None and rng.random() < 0.7:
                node.start()
    for node in cluster.nodes.values():
        if node.code is not None:
            node.start()
    cluster.assert_finished()


@pytest.mark.long
@pytest.mark.parametrize("whose", ["host", "other"])
def test_a_node_is_cut_off_and_joined_again(tmp_path: Path, whose: str) -> None:
    """Nothing is reset: connections just fall silent. The others go on without it; its workers end; then it is back."""
    if reason := why_not():
        pytest.skip(reason)
    with network("abc", tmp_path / "server") as net:
        cluster = Cluster(tmp_path, pace_s=0.2, url=net.url, environment=net.environment)
        try:
            for name in "abc":
                cluster.node(name, address=net.addresses[name], within=net.within(name)).start()
            before = cluster.until_running(3, steps=8)
            host = cluster.host()
            lost = host if whose == "host" else next(node for node in cluster.nodes.values() if node is not host)
            net.cut_off(lost.name)
            fewer = cluster.until_running(2, before)
            eventually(lambda: not lost.workers(), cluster.said)
            assert lost.code is None, "the agent waits until it can join again"
            net.join(lost.name)
            cluster.until_running(3, fewer)
            assert cluster.until_running(3, fewer) > fewer
            cluster.assert_finished()
        finally:
            cluster.end()


# ---- handlers, without workers


def _handler(folder: Path, job: str = "job") -> ElasticHandler:
    return make_handler(RendezvousParameters("holdfast", str(folder), job, 1, 3, "127.0.0.1", **CONF))


def _meet(*handlers: ElasticHandler) -> list[RendezvousInfo]:
    """All join at the same time."""
    found: dict[int, RendezvousInfo] = {}

    def join(number: int) -> None:
        found[number] = handlers[number].next_rendezvous()

    threads = [threading.Thread(target=join, args=(number,)) for number in range(len(handlers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[number] for number in range(len(handlers))]


def test_a_round_whose_host_dies_lets_the_others_go_on(tmp_path: Path) -> None:
    """What torchrun's agent asks right after the rendezvous must not fail, or the agent ends as well."""
    handlers = [_handler(tmp_path), _handler(tmp_path)]
    first = _meet(*handlers)
    assert sorted(info.rank for info in first) == [0, 1]
    assert first[0].bootstrap_store_info == first[1].bootstrap_store_info
    host = next(number for number in (0, 1) if first[number].rank == 0)
    survivor, its_store = handlers[1 - host], first[1 - host].store
    # As a kill does it: no more heartbeats, no servers.
    handlers[host]._stop_heartbeats()
    handlers[host]._has_left = True
    del first[host:], first
    handlers[host]._server = handlers[host]._store = handlers[host]._shared_tcp_store_server = None  # type: ignore[assignment]
    handlers[host]._round_store = None
    handlers[host] = survivor

    its_store.set("torchelastic/role_info/1", "mine")
    assert len(its_store.multi_get(["torchelastic/role_info/0", "torchelastic/role_info/1"])) == 2
    its_store.get("torchelastic/assigned_ranks/1")
    its_store.wait(["never"])
    assert survivor.num_nodes_waiting() > 0
    again = survivor.next_rendezvous()
    assert (again.rank, again.world_size) == (0, 1)
    again.store.set("x", "y")
    assert again.store.get("x") == b"y"
    assert survivor.num_nodes_waiting() == 0
    assert survivor.shutdown()


def test_who_leaves_is_missed_at_once_and_an_ended_job_ends_for_all(tmp_path: Path) -> None:
    handlers = [_handler(tmp_path), _handler(tmp_path)]
    _meet(*handlers)
    stays, leaves = handlers
    assert stays.num_nodes_waiting() == 0
    leaves.leave()
    eventually(lambda: stays.num_nodes_waiting() == 1, str)
    assert stays.next_rendezvous().world_size == 1

    waiting = threading.Thread(target=lambda: codes.append(_exit_code(leaves)))
    codes: list[object] = []
    waiting.start()
    eventually(lambda: stays.num_nodes_waiting() == 1, str)
    assert stays.shutdown()
    waiting.join(60)
    assert codes == [0]

    # The same id, tomorrow; and an agent's own trouble ends it for nobody.
    others = [_handler(tmp_path), _handler(tmp_path)]
    assert [info.world_size for info in _meet(*others)] == [2, 2]
    try:
        raise RuntimeError("the agent's own")
    except RuntimeError:
        others[0].shutdown()
    assert not others[1].is_closed()
    assert others[1].next_rendezvous().world_size == 1
    another_job = _handler(tmp_path, "another")
    assert another_job.next_rendezvous().world_size == 1
    assert others[1].num_nodes_waiting() == 0
    for handler in (others[1], another_job):
        assert handler.shutdown()


def test_a_node_with_a_notice_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notice = tmp_path / "notice"
    monkeypatch.setenv("HOLDFAST_NOTICE", f"file:{notice}")
    goes = _handler(tmp_path)
    monkeypatch.setenv("HOLDFAST_NOTICE", "none")
    stays = _handler(tmp_path)
    _meet(goes, stays)
    notice.write_text("60s")
    eventually(lambda: goes._departure.is_near, str)
    assert _exit_code(goes) == EXIT_PREEMPTED
    goes.leave()
    eventually(lambda: stays.num_nodes_waiting() == 1, str)
    assert stays.next_rendezvous().world_size == 1
    assert stays.shutdown()


def _exit_code(handler: ElasticHandler) -> object:
    try:
        handler.next_rendezvous()
    except SystemExit as leaving:
        return leaving.code
    except RendezvousClosedError:
        return "closed"
    return "joined"
