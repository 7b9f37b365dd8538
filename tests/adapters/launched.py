"""One rank of a training that a launcher has started: `launched.py hf_job.main '{"train": {…}, "pauses": [[1, "stepping:7"]]}'`.

`pauses`: in its first incarnation (torchrun counts restarts) this rank waits at this place to be killed, in the second the next …
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.extend(str(folder) for folder in (HERE, *(HERE.parent / name for name in ("kills", "support", "ranks"))))

if __name__ == "__main__":
    (module, _, function), request = sys.argv[1].rpartition("."), json.loads(sys.argv[2])
    count, rank = (int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "LOCAL_RANK"))
    pauses = dict(request["pauses"][count : count + 1])
    train = getattr(importlib.import_module(module), function)
    train(**request["train"], pause_in=pauses.get(rank, ""))
