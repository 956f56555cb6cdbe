"""Forked trainings: how much of a task's own progress another task takes, and how much other weights give back.

From checkpoints of one training short branches are taken, on the same batches: as it is, without a task, with other
static weights. Each branch starts with the optimizer state to which its own weights would have led.
"""

from gradprobe.forks.branches import ForkedTraining, ForkOptions
from gradprobe.forks.forked_training import fork
from gradprobe.forks.lost_progress import LostProgress, over_seeds

__all__ = ["ForkOptions", "ForkedTraining", "LostProgress", "fork", "over_seeds"]
