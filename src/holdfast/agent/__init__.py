"""L3, around the process on one machine: starts the command, passes signals on, cleans up behind it, starts it again.

The agent never imports the trainer. It knows the command only by `core.contract`: environment variables, exit codes and
the progress page.
"""
