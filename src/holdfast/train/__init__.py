"""L3, in the process: the training loop, its data, its state, and what happens to them when capacity is taken away."""
