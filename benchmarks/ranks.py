"""Two ranks side by side with DCP and torch_checkpointing: what a save costs the loop, until it is durable, and the restore.

    .venv-bench/bin/python benchmarks/ranks.py [--size 1GiB] [--rounds 5] [--folder DIR] [--save]

gloo on this machine, DDP (a replica on each rank) and FSDP2 (a shard on each). The size is that of the whole state, weights and
AdamW's moments. Contestants take turns within a round; a first round is dropped; the slowest rank counts. Everybody's bytes are
fsynced (torch_checkpointing does not do it: here each rank does it for a half of the files, and it counts). Restores read from a
warm page cache, with everything imported before; only holdfast verifies, and claims the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
_WIDTH = 1024
_GIVE_UP_S = 600.0


# ---- one rank


def build(kind: str, size_bytes: int, seed: int) -> tuple[Any, Any]:
    """Model and optimizer whose state has about that size in all; three values for each parameter."""
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    layers = max(2, size_bytes // (3 * 4 * _WIDTH * _WIDTH))
    model: Any = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
    if kind == "fsdp":
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def change(model: Any, optimizer: Any) -> None:
    """No array is what was saved before, neither weights nor moments."""
    import torch

    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    with torch.no_grad():
        for value in (*model.parameters(), *moments):
            local = value.to_local() if hasattr(value, "to_local") else value
            local.mul_(1.01)


def with_holdfast(model: Any, optimizer: Any, folder: Path, rounds: int) -> list[dict[str, float]]:
    import torch.distributed as dist

    import holdfast

    found = []
    with holdfast.Run(
        str(folder / "run"), save_every="1000000 steps", notice="none", progress=False, keep=2, seed=0
    ) as run:
        run.track(model=model, optimizer=optimizer)
        for _ in run.batches(range(rounds)):
            change(model, optimizer)
            saves = run._session.saves
            assert saves is not None
            dist.barrier()
            started_s = time.perf_counter()
            handle = saves.save("benchmark")
            blocked_s = time.perf_counter() - started_s
            handle.wait()
            found.append({"blocked_s": blocked_s, "durable_s": time.perf_counter() - started_s})
    return found


def with_dcp(model: Any, optimizer: Any, folder: Path, rounds: int) -> list[dict[str, float]]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    found = []
    group = dist.new_group(backend="gloo")
    for number in range(rounds):
        change(model, optimizer)
        dist.barrier()
        started_s = time.perf_counter()
        weights, moments = get_state_dict(model, optimizer)
        future = dcp.async_save(
            {"model": weights, "optimizer": moments}, checkpoint_id=str(folder / f"dcp-{number}"), process_group=group
        )
        blocked_s = time.perf_counter() - started_s
        future.result()
        found.append({"blocked_s": blocked_s, "durable_s": time.perf_counter() - started_s})
        dist.barrier()
        if number and dist.get_rank() == 0:
            shutil.rmtree(folder / f"dcp-{number - 1}")
    return found


def _manager() -> Any:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(CheckpointManager.Config(storage_config=storage))


def with_torch_checkpointing(model: Any, optimizer: Any, folder: Path, rounds: int) -> list[dict[str, float]]:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict

    found = []
    manager = _manager()
    rank, size = dist.get_rank(), dist.get_world_size()
    for number in range(rounds):
        change(model, optimizer)
        path = folder / f"tc-{number}"
        dist.barrier()
        started_s = time.perf_counter()
        weights, moments = get_state_dict(model, optimizer)
        future = manager.save(str(path), {"model": weights, "optimizer": moments})
        with manager.lock():  # until this is free, the state may not be changed
            pass
        blocked_s = time.perf_counter() - started_s
        future.result()
        dist.barrier()
        for file in sorted(one for one in path.rglob("*") if one.is_file())[rank::size]:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        dist.barrier()
        found.append({"blocked_s": blocked_s, "durable_s": time.perf_counter() - started_s})
        if number and rank == 0:
            shutil.rmtree(folder / f"tc-{number - 1}")
    manager.close()
    return found


def restore_torch_checkpointing(model: Any, optimizer: Any, folder: Path) -> float:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    newest = max(folder.glob("tc-*"), key=lambda path: int(path.name.partition("-")[2]))
    manager = _manager()
    dist.barrier()
    started_s = time.perf_counter()
    weights, moments = get_state_dict(model, optimizer)
    state = manager.load(str(newest), into={"model": weights, "optimizer": moments})
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    took_s = time.perf_counter() - started_s
    manager.close()
    return took_s


def restore_holdfast(model: Any, optimizer: Any, folder: Path) -> float:
    import torch.distributed as dist

    from holdfast import Run

    dist.barrier()
    started_s = time.perf_counter()
    with Run(str(folder / "run"), notice="none", progress=False, extend=True) as run:
        run.track(model=model, optimizer=optimizer)
        run.restore()
        return time.perf_counter() - started_s


def restore_dcp(model: Any, optimizer: Any, folder: Path) -> float:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    newest = max(folder.glob("dcp-*"), key=lambda path: int(path.name.partition("-")[2]))
    dist.barrier()
    started_s = time.perf_counter()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=str(newest))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return time.perf_counter() - started_s


def warm(folder: Path) -> None:
    """What was written past the page cache is read into it, so that all start alike."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    while file.read(8 << 20):
                        pass
    dist.barrier()


SAVES: dict[str, Callable[[Any, Any, Path, int], list[dict[str, float]]]] = {
    "holdfast": with_holdfast, "DCP async_save": with_dcp, "torch_checkpointing": with_torch_checkpointing,
}  # fmt: skip
RESTORES: dict[str, Callable[[Any, Any, Path], float]] = {
    "holdfast": restore_holdfast, "DCP async_save": restore_dcp, "torch_checkpointing": restore_torch_checkpointing,
}  # fmt: skip


def agreement_us() -> float:
    """What every step pays for being ready to stop with the others."""
    from holdfast.train.ranks.agreement import Stance

    stance, steps = Stance(), 200_000
    started_s = time.perf_counter()
    for step in range(steps):
        stance.boundary(step, 1.0)
    return (time.perf_counter() - started_s) / steps * 1e6


def rank_main(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, size_bytes = arguments.folder, arguments.size_bytes
    model, optimizer = build(arguments.kind, size_bytes, seed=arguments.restore)
    if arguments.restore:
        result: Any = slowest(RESTORES[arguments.contestant](model, optimizer, folder))
    else:
        found = SAVES[arguments.contestant](model, optimizer, folder, 2)
        result = {name: slowest(found[-1][name]) for name in found[-1]}
        del model, optimizer
        warm(folder)
        model, optimizer = build(arguments.kind, size_bytes, seed=1)
        result["restore_2_s"] = slowest(RESTORES[arguments.contestant](model, optimizer, folder))
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


# ---- all of them


def launch(ranks: int, folder: Path, size_bytes: int, kind: str, contestant: str, *, restore: bool) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(HERE / "ranks.py"), "--rank", "--folder", str(folder), "--kind", kind]
        command += ["--contestant", contestant, "--size-bytes", str(size_bytes), "--restore", str(int(restore))]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=_GIVE_UP_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        if contestant == "torch_checkpointing" and restore:
            # As it is configured by default it does not load shards of other boundaries.
            return None
        codes = [process.returncode for process in processes]
        raise SystemExit(f"{contestant}, {kind}, {ranks} ranks: exit codes {codes}: {said}")
    return json.loads((folder / "result.json").read_text())


def one_round(folder: Path, size_bytes: int, kind: str, number: int) -> dict[str, dict[str, float]]:
    names = list(SAVES)
    names = names[number % len(names) :] + names[: number % len(names)]
    found: dict[str, dict[str, float]] = {}
    for name in names:
        place = folder / f"{kind}-{number}-{name.replace(' ', '-')}"
        place.mkdir()
        os.sync()
        figures = launch(2, place, size_bytes, kind, name, restore=False)
        figures["bytes"] = float(sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))
        figures["restore_1_s"] = launch(1, place, size_bytes, kind, name, restore=True)
        found[name] = figures
        shutil.rmtree(place)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    parser.add_argument("--save", action="store_true", help="write results/ranks-<cpus>cpu-<date>.json")
    for hidden in ("--kind", "--contestant"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--restore", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments)
        return
    from holdfast.core.config import parse_bytes

    size_bytes = parse_bytes(arguments.size)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "size_bytes": size_bytes, "rounds": arguments.rounds,
        "agreement_us_per_step": agreement_us(), "kinds": {},
    }  # fmt: skip
    for kind in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".bench-") as folder:
            rounds = [one_round(Path(folder), size_bytes, kind, number) for number in range(arguments.rounds + 1)][1:]
        summary: dict[str, Any] = {}
        for figure in rounds[0]["holdfast"]:
            values = {name: [found[name][figure] for found in rounds] for name in SAVES}
            values = {name: each for name, each in values.items() if None not in each}
            ratios = {
                peer: [found["holdfast"][figure] / found[peer][figure] for found in rounds]
                for peer in values
                if peer != "holdfast"
            }
            summary[figure] = {
                "medians": {name: median(each) for name, each in values.items()},
                "ratios": {
                    peer: {"median": median(each), "min": min(each), "max": max(each)} for peer, each in ratios.items()
                },
            }
            print(kind, figure, json.dumps(summary[figure]), flush=True)
        result["kinds"][kind] = {"samples": rounds, "summary": summary}
    print(f"agreement: {result['agreement_us_per_step']:.2f} µs a step")
    if arguments.save:
        path = HERE / "results" / f"ranks-{result['cpus']}cpu-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
