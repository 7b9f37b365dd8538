"""A machine of the imagined world: what `agent.machine` does, told in a page. Holder, grant, standby, words, an end of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.core.errors import NotFound
from holdfast.core.launches import (
    Answer,
    Command,
    Ended,
    GrantRecord,
    Holder,
    Intent,
    MachineWord,
    Pool,
    Pulse,
    answer_key,
    command_key,
    ended_key,
    grant_key,
    holder_key,
    intent_key,
    pulse_key,
    word_key,
)  # fmt: skip
from holdfast.core.sealed import seal, unseal

if TYPE_CHECKING:
    from imagined import ImaginedCloud

__all__ = ["BOOT_S", "NOTICE_S", "STOP_S", "ImaginedMachine"]

BOOT_S, STOP_S, NOTICE_S = 60, 20, 120
GIVES_UP_S = 300
"""A machine without a grant ends itself so long after its boot."""
SAVE_S, SETUP_S, FINAL_S = 10, 30, 60
LOOKS_S = 5
"""How often a machine reads its records."""


@dataclass
class ImaginedMachine:
    """A machine, and the agent on it. `advance` lets a second pass."""

    cloud: ImaginedCloud
    id: str
    pool: Pool
    launch: int
    token: str
    created_s: int
    gone_s: int | None = None
    ended_by: str | None = None
    ending_at_s: int | None = None
    preempt_at_s: int | None = None
    told_at_s: int | None = None
    withdraw_at_s: int | None = None
    never_claims: bool = False
    partitioned: bool = False
    """It cannot reach the store, and works on."""
    phase: str = "boot"
    words: int = 0
    ready_s: int | None = None
    claimed_s: int | None = None
    kept_s: int = 0
    done_s: int = 0
    saved_at_s: int = 0
    stopping_s: int | None = None
    seen_notice_of: int | None = None
    heard_notice: bool = False
    exit_code: int | None = None
    epoch: int = 0
    start_kept_s: int = 0

    @property
    def uptime_s(self) -> int:
        return self.cloud.now_s - self.created_s - BOOT_S

    def advance(self) -> None:
        now_s = self.cloud.now_s
        if self.gone_s is not None:
            return None
        if self.preempt_at_s is not None and now_s >= self.preempt_at_s:
            return self.die("provider")
        if self.ending_at_s is not None:
            if now_s >= self.ending_at_s:
                self.die(self.ended_by or "itself")
            return None
        if self.uptime_s < 0:
            return None
        self.act(now_s)
        return None

    def die(self, by: str) -> None:
        self.gone_s, self.ended_by, self.phase = self.cloud.now_s, by, "gone"

    def shut_down(self, by: str = "itself") -> None:
        if self.ending_at_s is None and self.gone_s is None:
            self.ending_at_s, self.ended_by = self.cloud.now_s + STOP_S, by

    # ---- what the agent does

    def act(self, now_s: int) -> None:
        if self.never_claims:
            return self.give_up()
        if self.phase == "working":
            self.work(now_s)
        if self.partitioned:
            lifetime_s = self.cloud.lifetimes.get(self.id, 0)
            return self.shut_down() if self.uptime_s >= lifetime_s else None
        match self.phase:
            case "boot":
                self.boot()
            case "waiting" if now_s % LOOKS_S == 0:
                self.wait()
            case "standby" if now_s % LOOKS_S == 0:
                self.stand_by(now_s)
            case "working":
                self.listen(now_s)
        return None

    def give_up(self) -> None:
        if self.uptime_s > GIVES_UP_S:
            self.shut_down()

    def read(self, key: str, kind: Any) -> Any:
        try:
            return unseal(self.cloud.store.get(key, max_bytes=1 << 20), kind, what=key)
        except NotFound:
            return None

    def boot(self) -> None:
        answer = self.read(answer_key(self.launch), Answer)
        if (answer is not None and answer.outcome != "machine") or self.read(ended_key(self.launch), Ended) is not None:
            return self.shut_down()
        mine = Holder(format=1, launch=self.launch, machine=self.id, boot=self.id, at_unix_s=float(self.cloud.now_s))
        self.cloud.store.put_new(holder_key(self.launch), seal(mine))
        if self.read(holder_key(self.launch), Holder).machine != self.id:
            return self.shut_down()
        self.phase = "waiting"
        return None

    def lifetime_s(self) -> int:
        longest, part = 0, 0
        while (grant := self.read(grant_key(self.launch, part), GrantRecord)) is not None:
            longest, part = max(longest, grant.lifetime_s), part + 1
        self.cloud.lifetimes[self.id] = longest
        return longest

    def commanded(self) -> str | None:
        part, last = 0, None
        while (command := self.read(command_key(self.launch, part), Command)) is not None:
            last, part = command.kind, part + 1
        return last

    def wait(self) -> None:
        answer = self.read(answer_key(self.launch), Answer)
        if self.lifetime_s() <= self.uptime_s or (answer is not None and answer.outcome != "machine"):
            return self.give_up()
        if self.uptime_s >= SETUP_S:
            self.say("ready")
            self.ready_s, self.phase = self.cloud.now_s, "standby"
        return None

    def stand_by(self, now_s: int) -> None:
        if self.lifetime_s() <= self.uptime_s or self.commanded() is not None:
            return self.shut_down()
        intent: Intent = self.read(intent_key(self.launch), Intent)
        if intent.predecessor is not None and not self.may_claim(intent.predecessor, now_s):
            return None
        self.cloud.claim(self, intent.predecessor)
        self.say("claimed", attempt=self.epoch)
        self.phase, self.claimed_s, self.saved_at_s = "working", now_s, now_s
        self.done_s = self.kept_s = self.cloud.durable_s
        self.start_kept_s = self.cloud.durable_s
        return None

    def may_claim(self, other: int, now_s: int) -> bool:
        if self.read(ended_key(other), Ended) is not None:
            return True
        part, standing = 0, None
        while (word := self.read(word_key(other, part), MachineWord)) is not None:
            if word.kind == "released":
                return True
            standing = word if word.kind == "notice" else None if word.kind == "withdrawn" else standing
            part += 1
        if standing is None or standing.deadline_s is None:
            self.seen_notice_of = None
            return False
        self.seen_notice_of = now_s if self.seen_notice_of is None else self.seen_notice_of
        return now_s > self.seen_notice_of + standing.deadline_s + FINAL_S

    def work(self, now_s: int) -> None:
        self.done_s += 1
        if self.stopping_s is None and self.done_s >= self.cloud.work_s:
            self.stopping_s, self.exit_code = now_s + SAVE_S, 0
        if not self.partitioned and now_s - self.saved_at_s >= self.cloud.save_every_s and self.stopping_s is None:
            self.save()

    def save(self) -> None:
        self.saved_at_s = self.cloud.now_s
        if self.cloud.commit(self):
            self.kept_s = self.done_s
        else:
            self.leave(76)

    def listen(self, now_s: int) -> None:
        if self.told_at_s is not None and now_s >= self.told_at_s and not self.heard_notice:
            self.heard_notice = True
            if self.withdraw_at_s is None:
                assert self.preempt_at_s is not None
                self.say("notice", notice="preemption", deadline_s=self.preempt_at_s - now_s)
                self.stopping_s, self.exit_code = self.preempt_at_s - SAVE_S - 20, 75
            else:
                self.say("notice", notice="rebalance" if self.cloud.advice else "preemption",
                         deadline_s=None if self.cloud.advice else NOTICE_S)  # fmt: skip
        if self.withdraw_at_s is not None and self.heard_notice and now_s >= self.withdraw_at_s:
            self.say("withdrawn")
            self.withdraw_at_s = self.told_at_s = None
        looks = now_s % LOOKS_S == 0 and self.stopping_s is None
        if looks and (self.commanded() == "stop" or self.uptime_s >= self.lifetime_s()):
            self.stopping_s, self.exit_code = now_s + SAVE_S, 78
        if now_s % 30 == 0:
            pulse = Pulse(
                format=1, launch=self.launch, machine=self.id, uptime_s=self.uptime_s, step=self.done_s, kept_step=self.kept_s,
                kept_work_s=self.kept_s - self.start_kept_s, at_unix_s=float(now_s),
            )  # fmt: skip
            self.cloud.store.put(pulse_key(self.launch), seal(pulse))
        if self.stopping_s is not None and now_s >= self.stopping_s:
            assert self.exit_code is not None
            if self.exit_code == 0 and self.done_s < self.cloud.work_s:
                raise AssertionError("finished without the work")
            saved = self.cloud.commit(self)
            self.leave(self.exit_code if saved else 76)

    def leave(self, exit_code: int) -> None:
        if exit_code == 0:
            self.cloud.finished += 1
        self.say("released", exit_code=exit_code)
        self.phase = "left"
        self.shut_down()

    def say(self, kind: str, **more: Any) -> None:
        word = MachineWord(
            format=1, launch=self.launch, part=self.words, machine=self.id, kind=kind, uptime_s=self.uptime_s,  # type: ignore[arg-type]
            at_unix_s=float(self.cloud.now_s), **more,
        )  # fmt: skip
        assert self.cloud.store.put_new(word_key(self.launch, self.words), seal(word))
        self.cloud.bell(self.launch, self.words)
        self.words += 1
