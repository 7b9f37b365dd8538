"""Two ranks as users start them, by torchrun or `accelerate launch`: the command, and the ranks that it has started.

with started("torchrun", [script, …], folder=…, restarts=2) as process: workers_of(process) → {rank: pid}
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["ENVIRON", "command_of", "free_port", "started", "workers_of"]

ENVIRON = {
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOLDFAST_NOTICE": "none",
    # docs/ranks.md: otherwise ranks that are started again may find the addresses of dead ones.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # As torchrun's --standalone has it, for `accelerate launch`, which has no such option: a port that is free.
    "PET_RDZV_ENDPOINT": "localhost:0",
}  # fmt: skip


def command_of(launcher: str, script: Sequence[str], *, restarts: int = 0) -> list[str]:
    """`launcher`: `alone`, `torchrun` or `accelerate`. Two ranks on this machine but for the first. The last is told of GPUs, since
    with `--cpu` it starts one process, whatever number it is given."""
    if launcher == "alone":
        return [sys.executable, *script]
    around = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"],
        "accelerate": [
            "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", f"--main_process_port={free_port()}", "--rdzv_backend=c10d", f"--max_restarts={restarts}",
        ],
    }  # fmt: skip
    return [sys.executable, "-m", *around[launcher], *script]


@contextmanager
def started(
    command: Sequence[str], folder: Path, *, environ: Mapping[str, str] | None = None, output: int | IO[str] = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """In a session of its own, with all its output in one place. What still runs when the block is left is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        list(command), cwd=folder, env={**os.environ, **ENVIRON, **(environ or {})}, stdout=output,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for pid in (*workers_of(process).values(), process.pid):
                    os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def workers_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """The living ranks that a launcher has started, with their pids."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == process.pid and state != "Z":
                    environ = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text().split("\0"))
                    found[int(environ["LOCAL_RANK"])] = int(folder.name)
        except (OSError, KeyError):
            pass  # gone meanwhile, or something else
    return found
