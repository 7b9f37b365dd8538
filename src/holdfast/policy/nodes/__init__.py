"""How many nodes on spot, and how many on-demand: facts, rules and words, for jobs of several nodes."""
