"""From the opening of the gate to a restored training: what does a standby gain by restoring ahead?

    .venv/bin/python benchmarks/standby.py [--size 500MB] [--rate 100MB/s] [--rounds 5] [--save]

A training of that size, in an S3 emulator on this machine, saves once; the standby comes, and when it has fetched what there is,
the old training makes its last save and ends. That moment is the opening of the gate: the new training starts as a process of
its own, and the time until its state is restored is taken. Each machine has a line of `--rate`, in each direction.

    without   nothing is fetched ahead
    heads     what the newest head names is fetched, until the gate opens; the rest is the training's own business
    ahead     as it is built: what a save in progress has sent is fetched as well, and it goes on while the training starts

Each once with a last save in which all bytes are new (a dense training) and once with a fifth of them (a large part is frozen).
Ways are interleaved and their order rotates; every restored state is compared with the one that was saved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from holdfast.agent.machine.ahead import Ahead
from holdfast.core.clock import SystemClock
from holdfast.core.config import parse_bytes
from holdfast.core.contract import Phase, Progress
from holdfast.core.jobfile import parse_rate
from holdfast.store.open import open_store
from holdfast.testing.servers import ObjectServer, ministack_server

HERE = Path(__file__).resolve().parent
WAYS = ("without", "heads", "ahead")
_GIVE_UP_S = 600.0
_MIB = 1 << 20
_TRAINING = """
    import os, pathlib, sys, time
    import torch, holdfast
    count, share, folder = int(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3])
    fresh = torch.Generator().manual_seed(1)
    arrays = {f"a{n}": torch.zeros(1 << 18) for n in range(count)}
    def change(some):
        for n in range(int(count * some)):
            arrays[f"a{n}"].copy_(torch.rand(1 << 18, generator=fresh))
    def told(): return str(sum(float(array.double().sum()) * (n + 1) for n, array in enumerate(arrays.values())))
    try:
        with holdfast.Run(save_every="1000000 steps", notice=None, progress=False) as run:
            run.track(arrays=arrays)
            begun_s = time.time()
            if run.restore():
                restored_s = time.time()
                (folder / "restored").write_text(f"{restored_s} {restored_s - begun_s} {told()}")
                os._exit(0)
            for step in run.batches(range(1000)):
                if step == 0:
                    change(1.0)
                elif step == 1:
                    (folder / "saved").touch()
                    while not (folder / "last").exists():
                        time.sleep(0.02)
                    change(share)
                    (folder / "told").write_text(told())
                else:
                    handle.wait(600)
                    raise KeyboardInterrupt
                handle = run.save()
    except KeyboardInterrupt:
        pass
"""


class Line:
    """A TCP relay on 127.0.0.1 that passes on so many bytes a second, in each direction."""

    def __init__(self, target: int, bytes_per_s: float) -> None:
        self._target, self._bytes_per_s = target, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._free_at_s = {"up": 0.0, "down": 0.0}
        self._lock = threading.Lock()
        self.passed_bytes = {"up": 0, "down": 0}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for one, other, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pass, args=(one, other, way), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, way: str) -> None:
        with suppress(OSError):
            while piece := one.recv(256 << 10):
                with self._lock:
                    now_s = time.monotonic()
                    self._free_at_s[way] = max(now_s, self._free_at_s[way]) + len(piece) / self._bytes_per_s
                    rest_s = self._free_at_s[way] - now_s
                    self.passed_bytes[way] += len(piece)
                if rest_s > 0.001:
                    time.sleep(rest_s)
                other.sendall(piece)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@contextmanager
def lines(server: ObjectServer, bytes_per_s: float) -> Iterator[tuple[Line, Line]]:
    """Of the old machine and of the new one."""
    port = int(server.endpoint.rpartition(":")[2])
    both = (Line(port, bytes_per_s), Line(port, bytes_per_s))
    try:
        yield both
    finally:
        for line in both:
            line.close()


def over(server: ObjectServer, line: Line) -> Mapping[str, str]:
    """The environment of a process that has this line to the store."""
    return {**os.environ, **server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}"}


def until(what: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    give_up_s = time.monotonic() + _GIVE_UP_S
    while not what():
        if time.monotonic() > give_up_s or (process is not None and process.poll() not in (None, 0)):
            raise SystemExit("the benchmark does not get on")
        time.sleep(0.005)


def one(
    way: str, share: float, size_bytes: int, bytes_per_s: float, server: ObjectServer, url: str
) -> dict[str, float]:
    """One handover. Seconds and bytes."""
    with tempfile.TemporaryDirectory(prefix="holdfast-standby-") as name, lines(server, bytes_per_s) as (before, line):
        folder = Path(name)
        (folder / "train.py").write_text(textwrap.dedent(_TRAINING))
        arguments = [sys.executable, str(folder / "train.py"), str(max(5, size_bytes // _MIB)), str(share), str(folder)]
        options = {**server.options, "endpoint": f"http://127.0.0.1:{line.port}"}
        environment = {**over(server, before), "HOLDFAST_RUN": url}
        old = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
        until((folder / "saved").exists, old)
        store = open_store(url, options=options)
        until(lambda: any(True for _ in store.list("heads/")) and _has_checkpoint(store), old)
        said: list[str] = []
        ahead = Ahead(store, folder / "staged", clock=SystemClock(), say=said.append, look_s=1.0)
        if way == "heads":
            ahead._stager._look_for_coming = lambda head: None  # type: ignore[method-assign]
        told_s = 0.0
        if way == "without":
            (folder / "last").touch()
            old.wait(_GIVE_UP_S)
        else:
            with ahead.beside_waiting():
                until(lambda: said, old)
                (folder / "last").touch()
                told_s = time.time()
                old.wait(_GIVE_UP_S)
                if way == "heads":
                    ahead._stager.tell(is_enough=True)
        opened_s, passed_bytes = time.time(), line.passed_bytes["down"]
        environment = {**over(server, line), "HOLDFAST_RUN": url, "HOLDFAST_CONTROL": str(folder), **ahead.environment}
        new = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
        watch(ahead, folder, new)
        if new.wait() != 0:
            raise SystemExit(f"the new training ended with code {new.returncode}")
        restored_s, restore_s, told = (folder / "restored").read_text().split()
        if told != (folder / "told").read_text():
            raise SystemExit("the restored state is not the one that was saved")
        ahead.close()
        store.close()
        return {
            "open_to_restored_s": float(restored_s) - opened_s,
            "restore_s": float(restore_s),
            "fetched_after_open_bytes": float(line.passed_bytes["down"] - passed_bytes),
            "last_save_s": opened_s - told_s if told_s else 0.0,
        }


def _has_checkpoint(store: Any) -> bool:
    from holdfast.checkpoint.heads import read_truth

    head = read_truth(store).head
    return head is not None and bool(head.checkpoints)


def watch(ahead: Ahead, folder: Path, new: subprocess.Popen[bytes]) -> None:
    """The agent's look, once a second."""
    from holdfast.core.contract import ProgressPage

    page = ProgressPage(folder)
    page.reset()
    next_s = time.monotonic() + 1.0
    while new.poll() is None:
        time.sleep(0.02)
        if time.monotonic() >= next_s:
            next_s += 1.0
            progress: Progress | None = page.read()
            if progress is None or progress.phase is not Phase.FINISHED:
                ahead.look(progress)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="500MB")
    parser.add_argument("--rate", default="100MB/s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--save", action="store_true", help="write results/standby-<cpus>cpu-<date>.json")
    arguments = parser.parse_args()
    size_bytes, bytes_per_s = parse_bytes(arguments.size), parse_rate(arguments.rate)
    cases = list(itertools.product((1.0, 0.2), arguments.ways.split(",")))
    found: dict[str, list[dict[str, float]]] = {f"{way}, {share:.0%} new": [] for share, way in cases}
    with ministack_server() as server:
        for number in range(arguments.rounds):
            for place in range(len(cases)):
                share, way = cases[(place + number) % len(cases)]
                url = f"{server.make_bucket(f'standby-{number}-{place}')}/run"
                figures = one(way, share, size_bytes, bytes_per_s, server, url)
                found[f"{way}, {share:.0%} new"].append(figures)
                print(f"round {number + 1}: {way}, {share:.0%} new: {figures}", flush=True)
                empty(server, url)
    medians = {name: {what: median(each[what] for each in runs) for what in runs[0]} for name, runs in found.items()}
    for name, figures in medians.items():
        fetched_mb = figures["fetched_after_open_bytes"] / 1e6
        print(
            f"{name:24} open to restored {figures['open_to_restored_s']:6.2f} s, of that in restore() "
            f"{figures['restore_s']:6.2f} s; fetched after the opening {fetched_mb:6.1f} MB"
        )
    if arguments.save:
        result = {
            "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "size_bytes": size_bytes, "bytes_per_s": bytes_per_s,
            "rounds": found, "medians": medians, "load_average": os.getloadavg(),
        }  # fmt: skip
        path = HERE / "results" / f"standby-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def empty(server: ObjectServer, url: str) -> None:
    """The emulator keeps everything in memory."""
    store = open_store(url, options=server.options)
    for entry in store.list():
        store.delete(entry.key)
    store.close()


if __name__ == "__main__":
    main()
