"""A rendezvous' state as a sealed record, and back: who takes part, who waits, who was heard of when.

torch keeps it as a pickle. Unpickling runs what it is told, so no pickle lies in the bucket: what is read from there is this
record, checked field by field, and torch's own object is made of it in this process.
"""

from __future__ import annotations

from datetime import datetime

import msgspec
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from holdfast.core.errors import FormatError, IntegrityError
from holdfast.core.sealed import digest

__all__ = ["MOST_BYTES", "JobState", "Node", "Page", "decode_page", "encode_page", "from_torch", "into_torch"]

MOST_BYTES = 16 << 20


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One agent. `rank` is None for one that takes no part in the round; it then waits for the next, or is one too many."""

    addr: str
    pid: int
    id: int
    rank: int | None = None
    waits: bool = False
    spare: bool = False
    heard: datetime | None = None


class JobState(msgspec.Struct, frozen=True, kw_only=True):
    """`first_round` is the one with which this life of the job began: nobody was there before it. `finished` tells a job whose
    workers have done their work from one that was closed because they cannot."""

    round: int = 0
    first_round: int = 0
    complete: bool = False
    deadline: datetime | None = None
    closed: bool = False
    finished: bool = False
    nodes: list[Node] = []


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the state."""

    number: int
    nonce: str
    state: JobState


class _Sealed(msgspec.Struct, frozen=True):
    """As it lies in the store: the hash of the page's bytes, and they."""

    digest: str
    page: msgspec.Raw


def encode_page(page: Page) -> bytes:
    """The object of one version."""
    body = msgspec.json.encode(page)
    return msgspec.json.encode(_Sealed(digest(body), msgspec.Raw(body)))


def decode_page(data: bytes, number: int, *, what: str) -> Page:
    """Check the hash and the number, and decode. Raises IntegrityError, with `what` as the object's name in the message."""
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        if digest(bytes(sealed.page)) != sealed.digest:
            raise IntegrityError(f"{what}: the bytes do not match their hash; the object has been altered or torn")
        page = msgspec.json.decode(sealed.page, type=Page)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: not a record of a rendezvous: {error}") from error
    if page.number != number:
        raise IntegrityError(f"{what}: holds version {page.number}; it has been swapped or copied")
    return page


def from_torch(state: _RendezvousState) -> JobState:
    """The record of torch's object. `first_round` and `finished` are attributes that only ours have."""
    known = {*state.last_heartbeats, *state.participants, *state.wait_list, *state.redundancy_list}
    nodes = [
        Node(
            addr=node.addr, pid=node.pid, id=node.local_id, rank=state.participants.get(node),
            waits=node in state.wait_list, spare=node in state.redundancy_list, heard=state.last_heartbeats.get(node),
        )
        for node in sorted(known)
    ]  # fmt: skip
    return JobState(
        round=state.round, first_round=getattr(state, "first_round", 0), complete=state.complete,
        deadline=state.deadline, closed=state.closed, finished=getattr(state, "finished", False), nodes=nodes,
    )  # fmt: skip


def into_torch(record: JobState) -> _RendezvousState:
    """torch's object of a record."""
    state = _RendezvousState()
    state.round, state.complete = record.round, record.complete
    state.deadline, state.closed = record.deadline, record.closed
    vars(state).update(first_round=record.first_round, finished=record.finished)
    for entry in record.nodes:
        node = _NodeDesc(entry.addr, entry.pid, entry.id)
        if entry.rank is not None:
            state.participants[node] = entry.rank
        if entry.waits:
            state.wait_list.add(node)
        if entry.spare:
            state.redundancy_list.add(node)
        if entry.heard is not None:
            state.last_heartbeats[node] = entry.heard
    return state
