"""What the optimizer makes of the gradients: clipping, momentum, preconditioning, skipped steps; by task."""

from gradprobe.updates.updates import Updates

__all__ = ["Updates"]
