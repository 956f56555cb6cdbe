"""The audit: whether, and by which door, a task with weight 0 still changes another.

Two trainings from one snapshot, one with the task and one without it, in lockstep; compared bitwise, stage by stage.
Where they part, doors are held shut one by one and together until they do not.
"""

from gradprobe.audit.differences import CLASSES
from gradprobe.audit.experiment import Experiment, Trace
from gradprobe.audit.whole_audit import Audit, AuditOptions, audit, audit_section

__all__ = ["CLASSES", "Audit", "Experiment", "AuditOptions", "Trace", "audit", "audit_section"]
