"""Opening a run: whose is the URL, what is there already, and may this process claim it?

A run knows its identity: a digest of the tracked structure and the user's configuration. Where nobody named a URL, the default
folder must not resume yesterday's other experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from holdfast.checkpoint.format import Head, RunRecord
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.record import open_record
from holdfast.core.clock import Clock
from holdfast.core.contract import ENV_FRESH, ENV_PREVIOUS_STEP, ENV_RUN
from holdfast.core.errors import DifferentRun, RunRemoved, UsageError
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import digest
from holdfast.store.base import Store

__all__ = ["Claim", "StoreFactory", "choose_url", "identity_digest", "open_run", "wants_fresh"]


class StoreFactory(Protocol):
    """Opens the store of a URL."""

    def __call__(self, url: str, *, options: Mapping[str, str] | None = None) -> Store: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that is open. `lineage` is None for a finished run, which is only read, and on ranks whose claim is rank 0's. `before`:
    the head that was claimed."""

    record: RunRecord
    head: Head | None
    lineage: Lineage | None
    finished: bool
    before: Head | None = None


def choose_url(url: str | None, environ: Mapping[str, str], script: str) -> tuple[str, bool]:
    """The run's URL, and whether it is only the default: the caller's, the launcher's, else `./runs/<script>`."""
    if url is not None:
        return url, False
    if environ.get(ENV_RUN):
        return environ[ENV_RUN], False
    stem = Path(script).stem
    if stem == "__main__":  # python -m package
        stem = Path(script).resolve().parent.name
    if not stem or stem in ("-c", "-m", "ipykernel_launcher"):
        raise UsageError("Run(): name the run's URL; there is no script to derive one from")
    return f"./runs/{stem}", True


def wants_fresh(fresh: bool, environ: Mapping[str, str]) -> bool:
    """Whether this start begins a new generation.

    A restart never does, by the agent or (within the agent's first start) by torchrun: it would throw the first start's work away.
    """
    if ENV_PREVIOUS_STEP in environ or environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return False
    return fresh or environ.get(ENV_FRESH) == "1"


def identity_digest(structure: Mapping[str, Any], config: Mapping[str, Any] | None) -> str:
    """A digest of what is tracked and of the user's configuration."""
    return digest(msgspec.json.encode([structure, config], order="deterministic"))


def open_run(
    store: Store,
    *,
    is_default_url: bool,
    identity: str,
    fresh: bool,
    extend: bool,
    clock: Clock,
    tokens: TokenSource,
    warn: Callable[[str], None],
) -> Claim:
    """Find out what is at the URL and claim it.

    Raises DifferentRun, RunRemoved, StoreUnsafe, Fenced, and what the store raises. A finished run is returned without a claim
    unless `extend` or `fresh` says to go on.
    """
    record = open_record(store, clock=clock, tokens=tokens, warn=warn)
    truth = read_truth(store, record.run_id)
    for problem in truth.altered:
        warn(f"a head does not verify and is passed over: {problem}")
    head = truth.head
    if head is not None and not fresh:
        if head.removed:
            raise RunRemoved(
                f"{store.url}: this run has been removed. Start over here with fresh=True, or use another URL"
            )
        if is_default_url and head.checkpoints and head.identity not in ("", identity):
            raise DifferentRun(
                f"{store.url}: another experiment lives here (its tracked objects or its config differ from this script's). "
                "Give this one a URL of its own: Run('./runs/NAME'), start over here with fresh=True or `holdfast run --fresh`, "
                f"or name this URL explicitly to resume it all the same: Run({store.url!r})"
            )
        if head.finished and not extend:
            return Claim(record, head, None, finished=True)

    def begin(body: Head) -> Head:
        generation = body.generation + 1 if fresh and body.number else body.generation
        return msgspec.structs.replace(body, identity=identity, generation=generation)

    lineage = Lineage(store, record.run_id, clock=clock, tokens=tokens)
    return Claim(record, lineage.claim(begin, revive=fresh), lineage, finished=False, before=head)
