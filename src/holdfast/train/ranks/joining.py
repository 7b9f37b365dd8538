"""The start of a run on several ranks: find each other, one claim, one seed, one checkpoint for all.

join:    rank 0 opens the hub, says where through the process group, the others connect
claim:   rank 0 claims; the others hear what it has found
restore: all try the same checkpoint, and go on only if all have it; else all fall back to the one before
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head, RunRecord
from holdfast.checkpoint.read import Fallback
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, RanksApart, RestoreError
from holdfast.train.devices import Device
from holdfast.train.opening import Claim
from holdfast.train.ranks.hub import Hub, Spoke
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.world import World, next_run, publish, reachable_host, whereabouts

__all__ = ["claim_together", "join", "restore_together", "same_for_all"]

_JOIN_S = 300.0
_REACH_S, _AGAIN_S = 120.0, 0.2
Result = TypeVar("Result")


class _Found(msgspec.Struct, frozen=True):
    """What rank 0 has found at the URL."""

    record: RunRecord
    head: Head | None
    finished: bool
    devices: list[tuple[Device, int]]
    """Each kind, with how many ranks have it: every rank is told, so it must be short."""


def join(
    world: World, environ: Mapping[str, str], clock: Clock, told: Callable[[bytes], None], *, commit_timeout_s: float
) -> Together:
    """Connect all ranks. `told` hears of every notice that another rank has heard. Raises RanksApart and UsageError."""
    next_run()
    together = Together(world.rank, world.size, clock, commit_timeout_s=commit_timeout_s)
    if world.rank == 0:
        host, secret = reachable_host(environ), secrets.token_hex(32)
        hub = Hub(host, world.size, secret, together.heard, together.lost)
        together.connect(hub, told)
        hub.start()
        publish(host, hub.port, secret)
        together.wait_for_all(_JOIN_S)
        return together
    spoke = _reach(world, together, clock)
    together.connect(spoke, told)
    spoke.start()
    return together


def _reach(world: World, together: Together, clock: Clock) -> Spoke:
    """The first answer may be that of a rank 0 that has ended: torch's c10d rendezvous keeps the store of workers that it starts
    again, with all that is in it."""
    give_up_s = clock.monotonic_s() + _REACH_S
    while True:
        host, port, secret = whereabouts()
        try:
            return Spoke(host, port, world.rank, secret, lambda word: together.heard(0, word), lambda: together.lost(0))
        except OSError as error:
            if clock.monotonic_s() >= give_up_s:
                raise RanksApart(f"rank 0 cannot be reached at {host}, port {port}: {error}") from error
        clock.sleep(_AGAIN_S)


def claim_together(together: Together, claim: Callable[[], Claim], device: Device) -> tuple[Claim, list[Device]]:
    """One claim for all, made by rank 0; and what all ranks compute on. Raises what `claim` raises there, RanksApart elsewhere."""
    mine: list[Claim] = []

    def combine(payloads: list[bytes]) -> bytes:
        devices = [msgspec.json.decode(payload, type=Device) for payload in payloads]
        mine.append(claim())
        # What is condemned is rank 0's business, and a long list.
        head = None if mine[0].head is None else msgspec.structs.replace(mine[0].head, condemned=[])
        kinds = list(Counter(devices).items())
        return msgspec.json.encode(_Found(mine[0].record, head, mine[0].finished, kinds))

    answer = together.exchange("claim", msgspec.json.encode(device), combine, what="opening the run")
    found = msgspec.json.decode(answer, type=_Found)
    everywhere = [device for device, count in found.devices for _ in range(count)]
    return mine[0] if mine else Claim(found.record, found.head, None, found.finished), everywhere


def same_for_all(together: Together, name: str, value: int) -> int:
    """Rank 0's value."""
    answer = together.exchange(name, str(value).encode(), lambda payloads: payloads[0], what=f"agreeing on the {name}")
    return int(answer)


def restore_together(
    together: Together,
    refs: Sequence[CheckpointRef],
    load: Callable[[CheckpointRef], Result],
    *,
    fell_back: Callable[[Fallback], None],
    url: str,
) -> Result | None:
    """Load the newest of `refs` (oldest first) that verifies on every rank; None where there is none at all.

    Raises RestoreError when none does, and on every rank when one of them meets an error that is no loss: that rank raises it
    itself, the others RestoreError with its words.
    """
    failures: list[Fallback] = []
    for ref in reversed(refs):
        result: list[Result] = []
        error: Exception | None = None
        try:
            result.append(load(ref))
        except Exception as raised:
            error = raised
        verdict = together.exchange(
            f"restore {ref.name}", _word(together.rank, error), _worst, what=f"restoring step {ref.step}"
        ).decode()
        if not verdict:
            return result[0]
        if verdict.startswith(_FAILED):
            if error is not None:
                raise error
            raise RestoreError(f"{url}: step {ref.step} could not be restored on all ranks: {verdict[len(_FAILED) :]}")
        failures.append(Fallback(ref, verdict))
        fell_back(failures[-1])
    if not failures:
        return None
    reasons = "\n".join(f"  step {failure.checkpoint.step}: {failure.reason}" for failure in failures)
    raise RestoreError(f"{url}: none of the {len(failures)} retained checkpoints verifies on all ranks:\n{reasons}")


_FAILED = "failed: "


def _word(rank: int, error: Exception | None) -> bytes:
    if error is None:
        return b""
    kind = "" if isinstance(error, IntegrityError | NotFound) else _FAILED
    named = error if isinstance(error, HoldfastError) else f"{type(error).__name__}: {error}"
    return f"{kind}rank {rank}: {named}".encode()


def _worst(payloads: list[bytes]) -> bytes:
    """An error that is no loss outranks lost bytes: nothing may be declared lost while requests fail."""
    said = [payload for payload in payloads if payload]
    return next((word for word in said if word.startswith(_FAILED.encode())), said[0] if said else b"")
