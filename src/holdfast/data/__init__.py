"""L2: which sample comes when, and from which random stream: arithmetic on integers, without torch and without state."""
