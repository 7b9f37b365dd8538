"""A run under attack by notices: starts trainings, plays their agent, and reads what became of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import waiting
from forking import Zygote
from trainer import STEPS

from holdfast.agent.control import ControlSocket
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import read_truth
from holdfast.core.contract import ENV_CONTROL, NoticeWord, ProgressPage
from holdfast.core.events import Event
from holdfast.ledger.read import read_events
from holdfast.store.local import LocalStore

GIVE_UP_S = 40.0
"""Only ends a broken test."""


eventually = partial(waiting.eventually, give_up_s=GIVE_UP_S, every_s=0.002)


class Ground:
    """One run in a folder: `run` is its store, `control` is shared with its trainings."""

    def __init__(self, zygote: Zygote, folder: Path, **train: Any) -> None:
        self.zygote, self.train = zygote, train
        self.control, self.url, self.log = folder / "control", folder / "run", folder / "log"
        self.control.mkdir(parents=True)
        self.store = LocalStore(self.url)
        self.heard: list[str] = []
        self.agent: ControlSocket | None = None
        self.pid = 0

    # ---- the training

    def start(self, environ: dict[str, str] | None = None, **changes: Any) -> None:
        page = ProgressPage(self.control)
        page.reset()
        page.close()
        (self.control / "place").unlink(missing_ok=True)
        arguments = {"url": str(self.url), "control": str(self.control), **self.train, **changes}
        self.pid = self.zygote.start(arguments, {ENV_CONTROL: str(self.control), **(environ or {})}, self.log)

    def wait(self) -> int:
        """Its exit code; negative for a signal."""
        return self.zygote.wait(self.pid)

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def ended(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    def step(self) -> int:
        page = ProgressPage(self.control)
        try:
            progress = page.read()
            return -1 if progress is None else progress.step
        finally:
            page.close()

    def until(self, condition: Callable[[], object]) -> None:
        eventually(lambda: condition() or self.ended(), self.log.read_text)
        assert condition(), self.log.read_text()

    def until_place(self) -> None:
        self.until((self.control / "place").exists)

    def go_on(self) -> None:
        (self.control / "place").unlink()

    def finish(self) -> dict[str, Any]:
        """Nobody interrupts it any more; what came out."""
        for name in ("block", "put", "read", "place"):
            (self.control / name).unlink(missing_ok=True)
        self.start(pace_s=0.0, place="", notice="none", save_at=())
        assert self.wait() == 0, self.log.read_text()
        outcome: dict[str, Any] = json.loads((self.control / "result.json").read_text())
        return outcome

    # ---- its agent

    @contextmanager
    def attended(self) -> Iterator[ControlSocket]:
        self.agent = ControlSocket(self.control, self.heard.append)
        try:
            yield self.agent
        finally:
            self.agent.close()
            self.agent = None

    def tell(self, lead_s: float | None, *, kind: str = "preemption", id: str = "n", stands: bool = True) -> None:
        assert self.agent is not None
        now_s = time.time()
        deadline = None if lead_s is None else now_s + lead_s
        word = NoticeWord(kind=kind, deadline_unix_s=deadline, source="test", id=id, heard_unix_s=now_s)
        self.agent.tell(word, stands=stands)

    # ---- what became of it

    def checkpoints(self) -> list[CheckpointRef]:
        head = read_truth(self.store).head
        return [] if head is None else head.checkpoints

    def durable_step(self) -> int:
        return max((ref.step for ref in self.checkpoints()), default=0)

    def events(self, name: str) -> list[Event]:
        return [recorded.event for recorded in read_events(self.store) if recorded.event.name == name]

    def decisions(self) -> list[dict[str, Any]]:
        return [dict(event.fields) for event in self.events("notice.decided")]

    def assert_nothing_lost(self) -> None:
        """The last finished step is durable, and somebody has decided so."""
        (leaving,) = self.events("attempt.leaving")[-1:]
        assert leaving.fields["drained"], self.log.read_text()
        # The page says -1 before the first step.
        assert self.durable_step() == max(0, self.step()), self.log.read_text()
        assert self.decisions(), self.log.read_text()

    def assert_exact(self, reference: dict[str, Any]) -> None:
        assert self.step() < STEPS
        assert self.finish() == reference
