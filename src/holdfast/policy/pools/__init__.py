"""Where: which of several pools of spot capacity to try, to stay in, and to move to. Pure functions over arrays, pool x window."""
