"""Nodes come and go under torchrun: a rendezvous whose state lies in the run's object store and not on one of the nodes.

    torchrun --nnodes=1:4 --nproc-per-node=8 --max-restarts=100 --rdzv-backend=holdfast --rdzv-endpoint=s3://bucket/runs/x train.py

    torchrun's agent ── handler.py ── backend.py ── journal.py ── store      who is there, in numbered records (state.py)
                            └─ round_store.py ── TCP ── rank 0's agent       what the agents of one round tell each other

torch loads this package wherever torch.distributed.elastic is imported, so that nothing else is imported before a job asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

__all__ = ["torchrun_handler"]


def torchrun_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point `torchrun.handlers` names: torch calls it once and keeps what it returns as the maker of handlers."""
    return _make


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    from holdfast.train.elastic.handler import make_handler

    return make_handler(parameters)
