"""A training loop of one's own: a regression and a classification share a trunk.

python examples/plain_loop.py --out plain.h5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import gradprobe


class Model(nn.Module):
    """A trunk with two heads: how high is the sine, and in which quarter of its period is it?"""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.height, self.quarter = nn.Linear(64, 1), nn.Linear(64, 4)

    def losses(self, x: Tensor, height: Tensor, quarter: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {
            "height": nn.functional.mse_loss(self.height(features)[:, 0], height),
            "quarter": nn.functional.cross_entropy(self.quarter(features), quarter),
        }


def batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        phase = torch.rand(64, generator=draw)
        x = torch.sin(2 * torch.pi * phase[:, None] * torch.arange(1, 9))
        yield x + 0.1 * torch.randn(64, 8, generator=draw), torch.sin(2 * torch.pi * phase), (phase * 4).long()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("plain.h5"))
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--steps", type=int, default=100, help="per epoch")
    options.add_argument("--tensorboard", type=Path, help="a folder for the same numbers as scalars")
    args = options.parse_args()

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights = {"height": 1.0, "quarter": 0.5}
    sinks = []
    if args.tensorboard:
        from gradprobe.sinks.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(args.tensorboard))

    with gradprobe.attach(
        model, tuple(weights), args.out, every=10, optimizer=optimizer, sinks=sinks, overwrite=True
    ) as probe:
        for epoch in range(args.epochs):
            probe.epoch = epoch
            for batch in batches(args.steps, seed=epoch):
                losses = model.losses(*batch)
                probe.backward(losses, weights, batch_size=len(batch[0]))  # instead of (...).backward()
                optimizer.step()
                optimizer.zero_grad()
            probe.log_metrics(epoch, **{f"loss_{task}": loss.item() for task, loss in losses.items()})
    print(f"Recorded. Look at it: gradprobe summary {args.out}; gradprobe plot {args.out}")


if __name__ == "__main__":
    main()
