"""Jobs of several nodes, elastic or divisible, node by node."""
