"""Up to 1,024 ranks in one process: words, store requests, sizes and rank 0's time, and how each grows.

    .venv/bin/python benchmarks/ranks_at_scale.py [--ranks 8,64,256,1024] [--parameters 300] [--save]

The protocol is the real one (tests/ranks/at_scale.py says how it is driven); tensors are tiny, the store is memory. What the
network costs rank 0 is measured apart: the real hub in this process, all spokes in another one, over loopback.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "ranks"))

from at_scale_figures import Figures, figures, talked_to  # noqa: E402
from at_scale_states import Fsdp  # noqa: E402

from holdfast.checkpoint.heads import Lineage  # noqa: E402
from holdfast.checkpoint.joint import begin_word  # noqa: E402
from holdfast.checkpoint.phases import Done, Ready  # noqa: E402
from holdfast.checkpoint.snapshot import Layout, stream  # noqa: E402
from holdfast.checkpoint.tree import FlatTree  # noqa: E402
from holdfast.checkpoint.write import WrittenPart  # noqa: E402
from holdfast.core.clock import SystemClock  # noqa: E402
from holdfast.core.ids import random_token  # noqa: E402
from holdfast.store.memory import MemoryStore  # noqa: E402
from holdfast.train.ranks.hub import Hub, Spoke  # noqa: E402
from holdfast.train.ranks.together import Together  # noqa: E402
from holdfast.train.ranks.words import Wish  # noqa: E402

_SECRET = "0" * 64
_STACK_BYTES = 512 << 10
_GIVE_UP_S = 600.0
_ROWS = 1024
_RESTORING = 64
FASTER = 1.05
"""A count or size whose exponent is larger grows faster than linearly: numbers have more digits in a larger job."""
FASTER_TIME = 1.2
"""The same for CPU seconds, over the whole span: what fits into a CPU's cache on 8 ranks does not on 1,024."""


# ---- the hub, over loopback


def members_main(size: int, parameters: int) -> None:
    """All members of a job in one process, each with its own connection and thread. Does what it is told, line by line."""
    threading.stack_size(_STACK_BYTES)
    state = Fsdp(parameters, _ROWS, size)
    payloads = {rank: state.payload(rank) for rank in range(1, size)}
    togethers = {rank: Together(rank, size, SystemClock(), commit_timeout_s=_GIVE_UP_S) for rank in payloads}
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        if name == "join":
            for rank, together in togethers.items():
                _connect(together, int(arguments[0]), rank)
        elif name == "share":
            _each(togethers, lambda rank: togethers[rank].exchange("shares", payloads[rank], _nothing, what="sharing"))
        elif name == "wish":
            for together in togethers.values():
                together.wish(Wish("save", "somebody asked for it"))
        elif name == "save":
            begins = {rank: together.next_begin(1, 0) for rank, together in togethers.items()}
            for rank, begin in begins.items():
                togethers[rank].hand_in(Ready(name=begin.name, part=_part(begin.name, rank)))
            for rank, begin in begins.items():
                assert not togethers[rank].outcome(begin.name).error
        print("done", flush=True)


def _connect(together: Together, port: int, rank: int) -> None:
    spoke = Spoke("127.0.0.1", port, rank, _SECRET, lambda word: together.heard(0, word), lambda: together.lost(0))
    together.connect(spoke, lambda notice: None)
    spoke.start()


def _each(ranks: dict[int, Together], work: Callable[[int], Any]) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _nothing(payloads: list[bytes]) -> bytes:
    raise AssertionError("members combine nothing")


def _part(name: str, rank: int) -> WrittenPart:
    key = f"data/1/{rank:024x}"
    return WrittenPart(f"{name}/part-{rank}", 100_000, "0" * 64, (key,), (), 1 << 20, 1 << 20, (key,))


def over_loopback(size: int, parameters: int) -> Figures:
    """Seconds of rank 0's process: CPU, and until it was over (with what all members together take on this machine)."""
    found: Figures = {}
    command = [sys.executable, str(HERE / "ranks_at_scale.py"), "--members", str(size), "--parameters", str(parameters)]
    members = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert members.stdin is not None
    assert members.stdout is not None

    def tell(line: str) -> None:
        assert members.stdin is not None
        members.stdin.write(line + "\n")
        members.stdin.flush()

    together = Together(0, size, SystemClock(), commit_timeout_s=_GIVE_UP_S)
    mine = Fsdp(parameters, _ROWS, size)
    head = Lineage(MemoryStore(), "a run", clock=SystemClock(), tokens=random_token).claim()
    ranks = tuple(range(size))
    snapshot = stream(FlatTree(b"", ()), Layout((), (), 0), step=1, epoch=0, metadata={}, ranks=ranks)
    hub = Hub("127.0.0.1", size, _SECRET, together.heard, together.lost)
    together.connect(hub, lambda notice: None)
    hub.start()
    try:
        assert members.stdout.readline() == "ready\n"
        with _timed(found, "join"):
            tell(f"join {hub.port}")
            together.wait_for_all(_GIVE_UP_S)
        members.stdout.readline()
        with _timed(found, "share.fsdp"):
            tell("share")
            mine.agree(together)
        members.stdout.readline()
        with _timed(found, "stop, all wish"):
            tell("wish")
            step = 1
            while together.boundary(step) is None:
                step += 1
                time.sleep(0.001)
        members.stdout.readline()
        with _timed(found, "save"):
            tell("save")
            name = "checkpoints/00000002-1-" + "0" * 24
            together.begin(begin_word(name, head, snapshot))
            assert together.gather(name, ranks).missing is None
            together.done(Done(name=name))
        members.stdout.readline()
    finally:
        together.close()
        members.stdin.close()
        members.wait(_GIVE_UP_S)
    return found


@contextmanager
def _timed(found: Figures, label: str) -> Iterator[None]:
    started_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    found[f"hub: {label}.cpu_s"] = time.process_time() - cpu_s
    found[f"hub: {label}.until_over_s"] = time.perf_counter() - started_s


# ---- how they grow


def restoring(size: int) -> list[int]:
    """Which ranks restore: all, or some of a large job, from the first to the last."""
    if size <= _RESTORING:
        return list(range(size))
    return sorted({round(number * (size - 1) / (_RESTORING - 1)) for number in range(_RESTORING)})


def exponents(name: str, values: list[float], sizes: list[int]) -> list[float]:
    """Between sizes that follow each other: 1 is linear."""
    members = [talked_to(name, size) for size in sizes]
    return [
        math.log(after / before) / math.log(more / fewer) if before and after else 0.0
        for before, after, fewer, more in zip(values, values[1:], members, members[1:], strict=False)
    ]


def growth(result: dict[str, Any]) -> dict[str, list[float]]:
    sizes = [int(size) for size in result["figures"]]
    each = {name: [found.get(name, 0.0) for found in result["figures"].values()] for name in _names(result)}
    return {name: exponents(name, values, sizes) for name, values in each.items()}


def _names(result: dict[str, Any]) -> list[str]:
    return list(list(result["figures"].values())[-1])


def faster_than_linear(result: dict[str, Any]) -> list[str]:
    """Counts and sizes by each step, CPU seconds over the whole span; how long all ranks together took here says nothing."""
    sizes = [int(size) for size in result["figures"]]
    found = []
    for name, each in result["growth"].items():
        limit = FASTER
        if name.endswith("_s"):
            first, last = (result["figures"][str(size)].get(name, 0.0) for size in (sizes[0], sizes[-1]))
            each, limit = exponents(name, [first, last], [sizes[0], sizes[-1]]), FASTER_TIME
        if max(each, default=0.0) > limit and not name.endswith("until_over_s"):
            found.append(f"{name} ({max(each):.2f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", default="8,64,256,1024")
    parser.add_argument("--parameters", type=int, default=300, help="of the model; AdamW keeps three tensors for each")
    parser.add_argument("--save", action="store_true", help="write results/ranks-at-scale-<date>.{json,md,png}")
    parser.add_argument("--members", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.members:
        members_main(arguments.members, arguments.parameters)
        return
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "python": platform.python_version(),
        "parameters": arguments.parameters, "figures": {},
    }  # fmt: skip
    for size in map(int, arguments.ranks.split(",")):
        started_s = time.perf_counter()
        found = figures(size, parameters=arguments.parameters, rows=_ROWS, restoring=restoring)
        found |= over_loopback(size, arguments.parameters)
        result["figures"][str(size)] = found
        print(f"{size} ranks: simulated in {time.perf_counter() - started_s:.0f} s", flush=True)
    result["growth"] = growth(result)
    result["faster_than_linear"] = faster_than_linear(result)
    from ranks_at_scale_report import draw, markdown

    print(markdown(result))
    if arguments.save:
        path = HERE / "results" / f"ranks-at-scale-{result['date']}"
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(result, picture=f"{path.name}.png"))
        draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
