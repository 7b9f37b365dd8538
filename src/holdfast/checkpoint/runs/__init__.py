"""What people do to a run from outside: look at it, verify it, roll it back, fork it, remove it.

inspect.py   its checkpoints, what they hold and cost
verify.py    every byte read and checked
rollback.py  back to an older checkpoint; dropping single ones
fork.py      a new run that begins with another one's checkpoint, by reference or by copy
base.py      another run whose unchanged tensors are referred to and not sent
pins.py      how forks and bases keep the bytes that they refer to from being swept
unpin.py     pins that nobody takes back
begin.py     claiming an empty place for a new run
remove.py    a run taken away, so that it stays away
"""
