"""What test_ranks.py has several processes do: one scenario after the other, results into a folder.

python tests/many_ranks.py FOLDER RANK SIZE
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import gradprobe
from gradprobe.processes import join
from gradprobe.trainers.dwa import DWA
from gradprobe.trainers.gradnorm import GradNorm
from gradprobe.trainers.rlw import RLW
from gradprobe.trainers.surgery import Surgery
from gradprobe.trainers.uncertainty import Uncertainty

TASKS = ("a", "b", "c")
WEIGHTS = {"a": 1.0, "b": 0.3, "c": 2.0}
STEPS, BATCH = 5, 13  # which no number of processes divides
WAYS = {"backward": {}, "record": {}, "low": {"memory": "low"}, "micro": {}}
SIZES = {2: (6, 7), 3: (4, 4, 5)}


SYNCHRONISED = ("backward", "record", "low")
"""The ways in which a whole batch is normalised: each micro-batch would be by itself."""


class SyncNorm(nn.Module):
    """BatchNorm by the samples of all processes: torch's own, SyncBatchNorm, refuses tensors that are on a CPU."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        count = all_reduce(torch.tensor(float(len(x))))
        apart = x - all_reduce(x.sum(0)) / count
        return apart * (all_reduce(apart.square().sum(0)) / count + 1e-5).rsqrt() * self.weight + self.bias


class Net(nn.Module):
    """With BatchNorm that is frozen; c leaves the trunk after its first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
        self.early = nn.Linear(16, 1)
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.norm.eval()

    def forward(self, x):
        one = self.norm(self.first(x)).tanh()
        two = self.second(one).tanh()
        return self.heads[0](two), self.heads[1](two), self.early(one)


def make(norm=None):
    """``norm``: in the place of the frozen one."""
    torch.manual_seed(0)
    model = Net()
    model.norm = norm or model.norm
    return model


def batch(step):
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))


def losses(model, x, factor=1.0):
    """Means over the samples; ``factor`` is the share of the samples times the number of processes."""
    a, b, c = model(x)
    found = {"a": (a - x[:, :1]).square().mean(), "b": (b + x[:, 1:2]).square().mean(), "c": c.cosh().mean()}
    return {task: loss * factor for task, loss in found.items()}


def recorded(model, path, way, rank=0, size=1):
    """Several steps of SGD; ``rank`` of ``size`` processes has its part of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with gradprobe.attach(model, TASKS, path, every=1, **WAYS[way]) as probe:
        for step in range(STEPS):
            x = batch(step) if size == 1 else batch(step).split(SIZES[size])[rank]
            probe.share = len(x) / BATCH
            factor = probe.share * size
            if way == "micro":
                parts = [x[:2], x[2:]]
                probe.backward(
                    None, WEIGHTS, micro=[losses(model, p, factor) for p in parts], batch_size=[2, len(x) - 2]
                )
            elif way == "record":
                found = losses(model, x, factor)
                probe.record(found, WEIGHTS, batch_size=len(x))
                sum(WEIGHTS[t] * found[t] for t in TASKS).backward()
            else:
                probe.backward(losses(model, x, factor), WEIGHTS, batch_size=len(x))
            optimizer.step()
            optimizer.zero_grad()


def balancers(model):
    """One of each kind that learns from losses or draws, over the tasks of this file."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    made = {
        "gradnorm": GradNorm(WEIGHTS, list(inner.first.parameters()), lr=0.3),
        "uncertainty": Uncertainty(WEIGHTS, lr=0.3),
        "dwa": DWA(TASKS, 1),
        "rlw": RLW(TASKS),
    }
    return made | ({"pcgrad": Surgery("pcgrad", model, WEIGHTS)} if find_spec("torchjd") else {})


def balanced(model, rank=0, size=1):
    """Balancer -> the weights of every step, at parameters that stay where they are."""
    history = {}
    for name, balancer in balancers(model).items():
        history[name] = []
        for step in range(STEPS):
            x = batch(step) if size == 1 else batch(step).split(SIZES[size])[rank]
            found = losses(model, x, len(x) / BATCH * size)
            weights = balancer.step(found)
            sum(weights[t] * found[t] for t in TASKS).backward()
            balancer.after_backward()
            model.zero_grad()
            history[name].append([weights[t] for t in TASKS])
    return history


def bundled(processes=None, **options):
    """Rows and weights of a bundled trainer whose model stays where it is, so that every row is at the same weights."""
    import training

    from gradprobe.trainers import loop

    still = {"optimizer": "SGD", "lr": 1e-30, "batch_size": 4, "n_train": 5, "gradnorm_lr": 0.3, **options}
    made = training.make("gradnorm", processes=processes, **still)
    made.model.train()
    for one in training.batches(made, 3):
        loop.train_step(made, one)
    made.probe.close()
    rows = [
        {
            "loss": r.loss,
            "gram": r.gram,
            "noise": r.gram_noise,
            "size": r.batch_size,
            "weight": r.weight,
            "status": r.status,
        }
        for r in made.rows
    ]
    return {"rows": rows, "weights": made.balancer.weights(), "watched": made.watcher.losses}


def main(folder, rank, size):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    processes = join(torch.device("cpu"))
    for way in WAYS:
        recorded(DistributedDataParallel(make()), folder / f"{way}.h5", way, rank, size)
    for way in SYNCHRONISED:
        model = DistributedDataParallel(make(SyncNorm(16)))
        recorded(model, folder / f"synchronised-{way}.h5", way, rank, size)
    out = {
        "agreed": processes.agreed({"a": float(rank), "b": 2.0}),
        "mean": processes.mean(np.array([rank, float("nan")])).tolist(),
    }
    out["balanced"] = balanced(DistributedDataParallel(make()), rank, size)
    if size == 2 and find_spec("yolov5"):
        out["bundled"] = bundled(processes)
    torch.save(out, folder / f"{rank}.pt")
    dist.barrier()
    processes.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
