"""One task per step, each on a data set of its own: the tasks are measured together all the same.

A step trains one task. At the steps that are measured, the other task's loss is made on its latest batch, with the
parameters as they are, so that both gradients are of one point and have a cosine.

python examples/alternating_tasks.py --out alternating.h5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import gradprobe

TASKS = ("height", "quarter")


class Model(nn.Module):
    """A trunk with two heads: how high is a sine, and in which quarter of its period is another?"""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64))
        self.heads = nn.ModuleDict({"height": nn.Linear(64, 1), "quarter": nn.Linear(64, 4)})

    def loss(self, task: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        output = self.heads[task](self.trunk(x).relu())
        if task == "height":
            return nn.functional.mse_loss(output[:, 0], target)
        return nn.functional.cross_entropy(output, target)


def batches(task: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A data set of the task's own."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        phase = torch.rand(64, generator=draw)
        x = torch.sin(2 * torch.pi * phase[:, None] * torch.arange(1, 9)) + 0.1 * torch.randn(64, 8, generator=draw)
        yield x, torch.sin(2 * torch.pi * phase) if task == "height" else (phase * 4).long()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("alternating.h5"))
    options.add_argument("--steps", type=int, default=300)
    args = options.parse_args()

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = {task: batches(task, seed) for seed, task in enumerate(TASKS)}
    latest = {task: next(data[task]) for task in TASKS}

    with gradprobe.attach(model, TASKS, args.out, every=10, optimizer=optimizer, overwrite=True) as probe:
        for step in range(args.steps):
            task = TASKS[step % len(TASKS)]
            latest[task] = next(data[task])
            # A function is called at measured steps alone; what its forward changes (BatchNorm, dropout) is put back.
            losses = {other: partial(model.loss, other, latest[other]) for other in TASKS if other != task}
            probe.backward({task: model.loss(task, latest[task]), **losses}, batch_size=len(latest[task][0]))
            optimizer.step()
            optimizer.zero_grad()
    print(f"Recorded. Look at it: gradprobe summary {args.out}; gradprobe plot {args.out}")


if __name__ == "__main__":
    main()
