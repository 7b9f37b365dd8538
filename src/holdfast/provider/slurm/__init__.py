"""Slurm: a job is submitted once, and Slurm restarts it. See docs/slurm.md.

script      the batch script: signals to the agent, exit codes to Slurm, a note of how it ended
words       options of sbatch, states and errors of Slurm, and the bound of what a job can use
delegate    sbatch, squeue, scontrol, sacct, scancel
"""

from __future__ import annotations

from holdfast.provider.slurm.delegate import SlurmDelegate
from holdfast.provider.slurm.words import Bound, bound_of

__all__ = ["Bound", "SlurmDelegate", "bound_of"]
