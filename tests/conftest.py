"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The machine may be busy, so how long an example takes says nothing; the same examples are tried at every run.
# What this machine is told is no business of the tests; those about notices name their source.
os.environ["HOLDFAST_NOTICE"] = "none"
settings.register_profile("holdfast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("holdfast")
