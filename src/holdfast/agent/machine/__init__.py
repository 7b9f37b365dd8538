"""The machine's side of a launch: from the first record to the end of the machine.

boot.py      which machine this is, and since when
records.py   sealed records, written once and read with patience; orders.py what the controller says; words.py what the machine says
gate.py      may a standby begin? ahead.py: what it fetches meanwhile
grants.py    how long the machine may work, as moments for the watchdog
code.py, secrets.py, prepare.py   from the job's record to a command that can be started
mounts.py, copying.py   the job's other files: what goes where, and several at once
set_up.py    the set-up as a process; setup_cache.py, setup_archive.py, changes.py: what it has made, for the next machine
kept.py      how much of the work that was done here is kept
life.py      all of it in order; errands.py the two threads beside it; machine.py with the real agent, watchdog and notices
"""
