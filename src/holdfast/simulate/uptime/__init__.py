"""One run on machines that live for drawn times: saves, notices and lost work in continuous time."""
