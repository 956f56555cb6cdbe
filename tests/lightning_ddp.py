"""Lightning on two processes: ``python lightning_ddp.py FOLDER bare|probed`` leaves FOLDER/MODE-RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from trainings import WEIGHTS, TwoHeads, samples

from gradprobe.integrations.lightning import GradprobeCallback


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TwoHeads()

    def training_step(self, batch, batch_idx):
        self.losses = self.net.losses(**batch)
        return sum(WEIGHTS[t] * loss for t, loss in self.losses.items())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(folder: Path, mode: str) -> None:
    seed_everything(3)
    callback = GradprobeCallback(("a", "b"), folder / "run.h5", weights=WEIGHTS, every=2)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[callback] if mode == "probed" else [],
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(samples(), batch_size=4))
    states = {"model": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    torch.save(states, folder / f"{mode}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
