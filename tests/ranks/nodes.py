"""Nodes on one machine: a torchrun agent and its workers each, killed as machines are, started again; what they have trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import waiting
from elastic_job import EPOCHS, GLOBAL_BATCH, SAMPLES

STEPS = EPOCHS * SAMPLES // GLOBAL_BATCH
_SCRIPT = Path(__file__).with_name("elastic_job.py")
_MARK = "ELASTIC_NODE"
_GIVE_UP_S = 240.0
"""Only ends a broken test."""


eventually = partial(waiting.eventually, give_up_s=_GIVE_UP_S, every_s=0.05)


class Node:
    """One agent and its workers, known by a variable in their environment: torchrun gives every worker a session of its own."""

    def __init__(self, name: str, cluster: Cluster, address: str = "127.0.0.1", within: tuple[str, ...] = ()) -> None:
        self.name, self.cluster, self.address, self.within = name, cluster, address, within
        self.log, self.notice = cluster.folder / f"log-{name}", cluster.folder / f"notice-{name}"
        self._agent: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._agent is None or self._agent.poll() is not None
        command = [
            *self.within, sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1",
            "--max-restarts=100", f"--local-addr={self.address}", "--rdzv-backend=holdfast",
            "--rdzv-id=job", f"--rdzv-conf={self.cluster.conf}",
            str(_SCRIPT), str(self.cluster.folder), str(self.cluster.pace_s),
            str(self.cluster.pace_alone_s or self.cluster.pace_s),
        ]  # fmt: skip
        environment = {
            **os.environ, **self.cluster.environment, _MARK: self.mark, "OMP_NUM_THREADS": "1",
            "HOLDFAST_RUN": self.cluster.url, "HOLDFAST_NOTICE": f"file:{self.notice}",
        }  # fmt: skip
        with self.log.open("ab") as log:
            self._agent = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def mark(self) -> str:
        return f"{self.cluster.folder.name}-{self.name}"

    @property
    def agent_pid(self) -> int:
        assert self._agent is not None
        return self._agent.pid

    @property
    def code(self) -> int | None:
        return None if self._agent is None else self._agent.poll()

    def processes(self) -> list[int]:
        """All that this node has started and that has not ended."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{_MARK}={self.mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def signal(self, number: int, *, agent_only: bool = False) -> None:
        assert self._agent is not None
        for pid in [self._agent.pid] if agent_only else self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def workers(self) -> list[int]:
        """Those of its processes that run the training."""
        found = []
        for pid in self.processes():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if str(_SCRIPT).encode() in command[:4]:
                    found.append(pid)
        return found

    def kill(self) -> None:
        """As when the machine is gone: what is started meanwhile is killed as well."""
        while self.processes():
            self.signal(signal.SIGKILL)
        if self._agent is not None:
            self._agent.wait()


class Cluster:
    """Several nodes that train one run. What its workers have written down is read from their traces."""

    def __init__(
        self,
        folder: Path,
        *,
        pace_s: float = 0.05,
        pace_alone_s: float | None = None,
        url: str = "",
        environment: Mapping[str, str] | None = None,
        conf: str = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,regroup_timeout=1",
    ) -> None:
        self.folder, self.pace_s, self.conf = folder, pace_s, conf
        self.pace_alone_s = pace_alone_s
        """So slow that the others are back before the end; None: as `pace_s`."""
        self.url, self.environment = url or str(folder / "run"), environment or {}
        self.nodes: dict[str, Node] = {}

    def node(self, name: str, **more: Any) -> Node:
        return self.nodes.setdefault(name, Node(name, self, **more))

    def end(self) -> None:
        for node in self.nodes.values():
            node.kill()

    def events(self) -> list[dict[str, Any]]:
        """What all workers have said, oldest first. A line that a kill has cut off says nothing."""
        said = []
        for path in self.folder.glob("trace-*"):
            for line in path.read_text().splitlines():
                with suppress(ValueError):
                    said.append({**json.loads(line), "node": path.name.split("-")[-2]})
        return sorted(said, key=lambda event: float(event["unix_s"]))

    def rounds(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """The events of each round that has come as far as to restore, in the order of their restores."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for event in self.events():
            grouped.setdefault(event["round"], []).append(event)
        begun = {
            name: min(event["unix_s"] for event in events if event["what"] == "restored")
            for name, events in grouped.items()
            if any(event["what"] == "restored" for event in events)
        }
        return [(name, grouped[name]) for name in sorted(begun, key=lambda name: begun[name])]

    def progress(self) -> tuple[int, int, int]:
        """Of the newest round that has made a step: its number, how many ranks it has, its newest step."""
        for number, (_, events) in reversed(list(enumerate(self.rounds()))):
            steps = [event["step"] for event in events if event["what"] == "step"]
            if steps:
                return number, int(events[0]["size"]), max(steps)
        return -1, 0, 0

    def until_running(self, size: int, after_round: int = -1, steps: int = 2) -> int:
        """Wait until a round of that many ranks, later than the given one, has made some steps. Returns its number."""

        def is_so() -> bool:
            number, its_size, _ = self.progress()
            if number <= after_round or its_size != size:
                return False
            made = {event["step"] for event in self.rounds()[number][1] if event["what"] == "step"}
            return len(made) >= steps

        eventually(is_so, lambda: f"no round of {size} ranks after {after_round}\n{self.said()}")
        return self.progress()[0]

    def host(self) -> Node:
        """The node of rank 0 in the newest round: its agent has the store that the others of the round talk through."""
        _, events = self.rounds()[-1]
        mark = next(event["node"] for event in events if event["rank"] == 0)
        return self.nodes[mark]

    def committed_samples(self) -> list[tuple[int, int]]:
        """What the model has been trained with. A step that was computed by several rounds counts as the last of them did it:
        that went on from a checkpoint before it."""
        of_step: dict[int, list[tuple[int, int]]] = {}
        for _, events in self.rounds():
            mine: dict[int, list[tuple[int, int]]] = {}
            for event in events:
                if event["what"] == "samples":
                    mine.setdefault(event["step"], []).extend((event["epoch"], index) for index in event["samples"])
            restored = [event["step"] for event in events if event["what"] == "restored"]
            assert len(set(restored)) == 1, "the ranks of one round have restored different steps"
            of_step = {step: samples for step, samples in of_step.items() if step < restored[0]} | mine
        return [sample for step in sorted(of_step) for sample in of_step[step]]

    def said(self) -> str:
        logs: Iterator[str] = (
            f"--- {path.name}\n{path.read_text()[-2500:]}" for path in sorted(self.folder.glob("log-*"))
        )
        return "\n".join(logs)

    def assert_finished(self) -> None:
        """Every agent that was not killed ended with 0, and every sample was used once in each epoch."""
        eventually(lambda: all(node.code is not None for node in self.nodes.values()), self.said)
        assert {node.code for node in self.nodes.values()} == {0}, self.said()
        seen = self.committed_samples()
        assert sorted(seen) == sorted((epoch, index) for epoch in range(EPOCHS) for index in range(SAMPLES))
        assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)
