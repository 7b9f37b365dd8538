"""L5: rehearse the loss of machines before the long job: the user's command is interrupted on purpose, and must come out the same.

    conduct.py   two uninterrupted runs → scenarios → verdicts
    attempt.py   the processes, and how far they are       scenarios.py   what is done to them
    family.py    all that a start has led to, a launcher's ranks included
    state.py     two final checkpoints, bit by bit         story.py       what the ledger says about every step
    judge.py     from that evidence to faults in words (pure)             report.py   the result

`conduct` is used by `holdfast drill` and by the pytest fixture (`fixture.py`).
"""
