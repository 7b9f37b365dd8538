"""Forks trainings of hf_victim.py, alone or as one of several ranks (hf_job.py); one such process serves all tests
(tests/support/forking.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.extend(str(folder) for folder in (HERE, *(HERE.parent / name for name in ("kills", "support", "ranks"))))

from forking import Zygote, serve  # noqa: E402

__all__ = ["shared"]


def shared(config: Any) -> Zygote:
    """For the whole session of pytest."""
    made = vars(config).get("_hf_zygote")
    if made is None:
        made = config._hf_zygote = Zygote(HERE / "hf_zygote.py").__enter__()
        config.add_cleanup(made.__exit__)
    return made


def train(**arguments: Any) -> None:
    import hf_job
    import hf_victim

    (hf_job.main if "RANK" in os.environ else hf_victim.train)(**arguments)


if __name__ == "__main__":
    import hf_job  # noqa: F401

    serve(train)
