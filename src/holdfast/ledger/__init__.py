"""L2: the append-only record of what happened in a run, and what follows from it."""
