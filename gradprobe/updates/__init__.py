"""What the optimizer makes of the gradients, by task, and what that does to the losses."""

from gradprobe.updates.loss_ledger import Ledger
from gradprobe.updates.update_record import Updates

__all__ = ["Ledger", "Updates"]
