"""A process that has imported torch, and what trainings import later on, and forks trainings on demand, so that a hundred starts
import nothing a hundred times.

    test: Zygote(script).start(…) → pid, wait(pid) → exit code          script: serve(train), the other end

One JSON request per line: {"start": {"train", "environ", "log"}} → {"pid": n}; {"wait": pid} → {"status": n}. The process stays
single-threaded, so forking it is safe.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Zygote", "serve"]

_AT_FIRST_USE = (
    # Torch's compiler comes with the first optimizer and with `use_deterministic_algorithms`: 1.4 s of the 2 s of a short training.
    "torch._dynamo", "torch._inductor.config", "numpy.random", "holdfast.checkpoint.runs.base", "holdfast.checkpoint.saver",
    "holdfast.train.base", "holdfast.train.batching", "holdfast.train.loops", "holdfast.train.run", "faulthandler", "resource",
)  # fmt: skip
"""Importing starts no thread, so the process may still be forked."""


class Zygote:
    """The test's side; used with `with`."""

    def __init__(self, script: Path, *arguments: str) -> None:
        command = [sys.executable, str(script), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=30)

    def start(self, train: Mapping[str, Any], environ: Mapping[str, str], log: Path | str) -> int:
        """Fork a training with these arguments, in a process group of its own; what it says is appended to `log`."""
        return int(self._ask({"start": {"train": train, "environ": environ, "log": str(log)}})["pid"])

    def wait(self, pid: int) -> int:
        """Its exit code; negative for a signal."""
        return int(self._ask({"wait": pid})["status"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def serve(train: Callable[..., None]) -> None:
    """The script's side: answers until its input ends."""
    for name in _AT_FIRST_USE:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _run(train, request["start"])
            answer = {"pid": pid}
        else:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        print(json.dumps(answer), flush=True)


def _run(train: Callable[..., None], request: dict[str, Any]) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(request["environ"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(**request["train"])
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
