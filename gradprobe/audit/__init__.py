"""The audit: whether, and by which door, a task with weight 0 still changes another.

Two trainings from one snapshot, one with the task and one without it, in lockstep; compared bitwise, stage by stage.
Where they part, doors are held shut one by one and together until they do not.
"""

from gradprobe.audit.audit import Audit, Options, audit
from gradprobe.audit.compare import CLASSES
from gradprobe.audit.experiment import Experiment, Trace

__all__ = ["CLASSES", "Audit", "Experiment", "Options", "Trace", "audit"]
