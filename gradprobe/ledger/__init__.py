"""The loss ledger: what each task's part of the update that was really made does to every task's loss."""
