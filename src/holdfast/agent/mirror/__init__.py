"""A folder that a script writes, kept under a run's URL: for scripts that have never heard of holdfast.

    folder.py    what lies in the folder: files, units of files that belong together, which of them have come to rest
    whole.py     what a file's own format says about whether it is whole
    state.py     a state of the folder ↔ a checkpoint: one array of bytes per file, read in pieces, never whole
    claim.py     whose is the URL
    local.py     what this machine remembers of the folder between two agents: which files were seen complete
    restore.py   from a checkpoint into the folder: beside it first, verified, then renamed into place
    passes.py    one look at the folder after the other; what is complete and new becomes a checkpoint
    mirror.py    the thread around the passes, and what the agent calls

    script → folder → passes → checkpoint.commit → store              (while the command runs, and once when it has ended)
    store → checkpoint.read → restore → folder → script               (before the start)

A state of the mirror is an ordinary committed checkpoint, so fencing, deduplication, retention, sweeping, verification and the
fallback to an older one are those of every run.
"""

from __future__ import annotations

from holdfast.agent.mirror.mirror import Mirror, MirrorOptions

__all__ = ["Mirror", "MirrorOptions"]
