"""L2, pure: decisions as functions of frozen facts, with their reasons. No clock, no randomness, no I/O in here."""
