"""A training whose ranks come and go, under torchrun: `elastic_job.py FOLDER PACE_S PACE_ALONE_S`. It notes what it does, and when.

FOLDER/trace-<node>-<pid>: one JSON object a line, {"what", "unix_s", …}; `round` is the same on all ranks of one start.
"""

from __future__ import annotations

import time

_STARTED_S = time.time()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

SAMPLES, BATCH, EPOCHS, GLOBAL_BATCH = 240, 8, 4, 12


def main() -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from holdfast import Run

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder, pace_s = Path(sys.argv[1]), float(sys.argv[2 if size > 1 else 3])
    its_round = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    trace = open(folder / f"trace-{os.environ['ELASTIC_NODE']}-{os.getpid()}", "a", buffering=1)  # noqa: SIM115

    def say(what: str, unix_s: float | None = None, **more: Any) -> None:
        told = {"what": what, "unix_s": unix_s or time.time(), "round": its_round, "rank": rank, "size": size, **more}
        trace.write(json.dumps(told) + "\n")

    say("started", _STARTED_S)
    torch.set_num_threads(1)
    say("imported")
    dist.init_process_group("gloo")
    say("joined")
    torch.manual_seed(7)
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.arange(SAMPLES), torch.randn(SAMPLES, 8, generator=inputs))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    with Run(save_every="5 steps", seed=3, progress=False) as run:
        run.track(model=model, optimizer=optimizer)
        say("restored", step=run.step)
        for epoch in run.epochs(EPOCHS):
            for index, x in run.batches(loader, global_batch=GLOBAL_BATCH):
                with run.accumulating(model):
                    (model(x).square().mean() * run.micro.weight).backward()
                if run.micro.weight:
                    say("samples", step=run.step, epoch=epoch, samples=index.tolist())
                if run.micro.last:
                    optimizer.step()
                    optimizer.zero_grad()
                    say("step", step=run.step + 1)
                time.sleep(pace_s)
    say("finished", step=run.step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
