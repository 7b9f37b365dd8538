"""Several processes, one run: who they are, how they talk, how they stop and save at the same step.

world.py      rank and size, and the way to rank 0         hub.py        the connections
words.py      what is said                                 agreement.py  the common step: state machines without I/O
together.py   what the run, its loops and its saver use
"""
