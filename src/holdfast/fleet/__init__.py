"""ABOVE the machines: what is launched, watched, paid for and ended. `state` decides and touches nothing, `shell` acts."""
