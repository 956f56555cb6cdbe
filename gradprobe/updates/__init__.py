"""What the optimizer makes of the gradients, by task, and what that does to the losses."""

from gradprobe.updates.ledger import Ledger
from gradprobe.updates.updates import Updates

__all__ = ["Ledger", "Updates"]
