"""What a controller writes, for tests that play one."""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.core.job_record import JOB_KEY, JobRecord
from holdfast.core.launches import (
    Allowed,
    Answer,
    Command,
    Ended,
    GrantRecord,
    Intent,
    MachineWord,
    Pool,
    answer_key,
    client_token,
    command_key,
    ended_key,
    grant_key,
    intent_key,
    word_key,
)
from holdfast.core.sealed import FORMAT_VERSION, seal, unseal
from holdfast.store.base import Store

__all__ = ["POOL", "Controller", "words_of"]

POOL = Pool("local", "here", "here-a", "small", "spot")


class Controller:
    """Writes into the store, with no faults of its own."""

    def __init__(self, store: Store, run_id: str = "run") -> None:
        self._store, self._run_id = store, run_id

    def _put(self, key: str, record: msgspec.Struct) -> None:
        self._store.put_new(key, seal(record))

    def job(self, **fields: object) -> None:
        known = {"run": "true", "name": "job", "grace_s": 10} | fields
        self._put(JOB_KEY, JobRecord(format=FORMAT_VERSION, nonce="j", **known))  # type: ignore[arg-type]

    def intent(self, launch: int, predecessor: int | None = None) -> None:
        self._put(
            intent_key(launch),
            Intent(
                format=FORMAT_VERSION, launch=launch, nonce=f"i{launch}", run_id=self._run_id, fleet="f",
                token=client_token(self._run_id, launch), request={}, reasons=(), predecessor=predecessor,
                allowed=(Allowed(pool=POOL, ceiling_microusd_h=900_000, on_demand_microusd_h=2_000_000),),
            ),
        )  # fmt: skip

    def grant(self, launch: int, part: int, lifetime_s: int, grace_s: int = 60) -> None:
        self._put(
            grant_key(launch, part),
            GrantRecord(
                format=FORMAT_VERSION, launch=launch, part=part, nonce=f"g{part}", lifetime_s=lifetime_s,
                machine_microusd_h=900_000, extras_microusd_h=0, once_microusd=0, nodes=1, uses=(), outside_s=60,
                grace_s=grace_s, minimum_s=60, least_s=60, wants_s=None,
            ),
        )  # fmt: skip

    def answer(
        self, launch: int, outcome: Literal["machine", "failed", "void"] = "machine", machine: str = "m"
    ) -> None:
        self._put(
            answer_key(launch),
            Answer(
                format=FORMAT_VERSION, launch=launch, nonce=f"a{launch}", outcome=outcome, machine=machine, pool=POOL,
                microusd_h=700_000,
            ),
        )  # fmt: skip

    def command(self, launch: int, part: int, kind: Literal["stop", "home"]) -> None:
        self._put(
            command_key(launch, part),
            Command(format=FORMAT_VERSION, launch=launch, part=part, nonce=f"c{part}", kind=kind, reasons=("said so",)),
        )

    def ended(self, launch: int) -> None:
        self._put(
            ended_key(launch),
            Ended(
                format=FORMAT_VERSION, launch=launch, nonce=f"e{launch}", machine="m", why="preempted", billed_s=1,
                cost_microusd=1, at_unix_s=0.0,
            ),
        )  # fmt: skip


def words_of(store: Store, launch: int) -> list[MachineWord]:
    """In order; a hole would be a flaw."""
    keys = [entry.key for entry in store.list(f"machines/{launch:08d}/") if "/word-" in entry.key]
    assert keys == [word_key(launch, part) for part in range(len(keys))]
    return [unseal(store.get(key, max_bytes=1 << 20), MachineWord, what=key) for key in keys]
