"""What a measured row costs several processes: time of a step, and what they tell each other.

python benchmarks/ranks.py [--processes 1 2 3] [--width 512] [--tasks 2] [--steps 30]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradprobe


class Net(nn.Module):
    def __init__(self, width, tasks):
        super().__init__()
        self.trunk = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.Tanh())))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def forward(self, x):
        z = self.trunk(x)
        return {f"t{i}": (head(z) - i).square().mean() for i, head in enumerate(self.heads)}


class Told:
    """Counts messages, and the bytes of each process's part in them."""

    def __init__(self):
        self.messages = self.bytes = 0
        self._reduce, self._gather = dist.all_reduce, dist.all_gather_object

    def __enter__(self):
        def reduce(tensor, *arguments, **options):
            self.messages += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return self._reduce(tensor, *arguments, **options)

        def gather(*arguments, **options):
            self.messages += 1
            return self._gather(*arguments, **options)

        dist.all_reduce, dist.all_gather_object = reduce, gather
        return self

    def __exit__(self, *_):
        dist.all_reduce, dist.all_gather_object = self._reduce, self._gather


def work(rank, size, store, arguments, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(arguments.width, arguments.tasks))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(64 // size, arguments.width)

    def step(backward):
        dist.barrier()
        started = time.perf_counter()
        backward(model(x))
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    bare, probed = [], []
    with gradprobe.attach(model, [f"t{i}" for i in range(arguments.tasks)], every=1, optimizer=optimizer) as probe:
        with Told() as told:
            for _ in range(3):
                step(probe.backward)
            told.messages = told.bytes = 0
            step(probe.backward)
        for _ in range(arguments.steps):
            bare.append(step(lambda losses: sum(losses.values()).backward()))
            probed.append(step(probe.backward))
        sizes = sum(layer.size for layer in probe.shared.layers)
    if rank == 0:
        ratio = statistics.median(p / b for p, b in zip(probed, bare, strict=True))
        cells = (size, sizes, statistics.median(bare) * 1e3, statistics.median(probed) * 1e3, ratio, told.messages)
        line = "| {} | {:,} | {:.1f} ms | {:.1f} ms | {:.2f} | {} | {:.1f} |"
        Path(out).write_text(line.format(*cells, told.bytes / sizes / 4))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    print(
        "| processes | shared parameters | bare step | measured | ratio | messages | copies of the shared parameters |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, (size, f"{folder}/store", arguments, f"{folder}/out"), nprocs=size)
            print(Path(folder, "out").read_text())


if __name__ == "__main__":
    main()
