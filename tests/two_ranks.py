"""What test_probes_ranks.py has two processes do: one scenario after the other, results into a folder.

python tests/two_ranks.py FOLDER RANK
"""

from __future__ import annotations

import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zoo import Collector

import gradprobe
from gradprobe import processes
from gradprobe.trainers.surgery import Surgery

TASKS = ("a", "b", "c")
STEPS, BATCH = 6, 12
WEIGHTS = {"a": 1.0, "b": 0.3, "c": 2.0}

WAYS = {
    "backward": {},
    "record": {},
    "low": {"memory": "low"},
    "sketched": {"sketch": (16, 3)},
    "sketched-low": {"sketch": 16, "memory": "low"},
    "both": {"level": "both"},
}


class Net(nn.Module):
    """c leaves the trunk after its first layer."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16, dtype=dtype), nn.Linear(16, 8, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.heads = nn.ModuleList([nn.Linear(8, 1, dtype=dtype), nn.Linear(8, 1, dtype=dtype)])
        self.early = nn.Linear(16, 1, dtype=dtype)

    def forward(self, x):
        one = self.norm(self.first(x).tanh())
        two = self.second(one).tanh()
        return self.heads[0](two), self.heads[1](two), self.early(one)


def batch(step, dtype):
    return torch.randn(BATCH, 6, dtype=dtype, generator=torch.Generator().manual_seed(step))


def losses(model, x):
    a, b, c = model(x)
    return {"a": (a - x[:, :1]).square().mean(), "b": (b + x[:, 1:2]).square().mean(), "c": c.cosh().mean()}


def make(dtype, seed=0):
    torch.manual_seed(seed)
    return Net(dtype)


def train(model, share, way, dtype, probe=None):
    """``share`` picks this process's samples of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        x = share(batch(step, dtype))
        found = losses(model, x)
        if probe is None:
            sum(WEIGHTS[t] * found[t] for t in TASKS).backward()
        elif way == "record":
            probe.record(found, WEIGHTS, batch_size=len(x))
            sum(WEIGHTS[t] * found[t] for t in TASKS).backward()
        else:
            probe.backward(found, WEIGHTS, batch_size=len(x))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def operated(model, share, dtype):
    """The weights of every step, and where the parameters end."""
    balancer, history = Surgery("mgda", model, WEIGHTS), []
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        found = losses(model, share(batch(step, dtype)))
        weights = balancer.step(found)
        history.append([weights[t] for t in TASKS])
        sum(weights[t] * found[t] for t in TASKS).backward()
        balancer.after_backward()
        sgd.step()
        sgd.zero_grad()
    return history, [p.detach().clone() for p in model.parameters()]


def recorded(model, path, share, way, dtype, sinks=()):
    with gradprobe.attach(model, TASKS, path, every=1, sinks=sinks, **WAYS[way]) as probe:
        return train(model, share, way, dtype, probe)


def updated(model, path, share):
    """With the updates of AdamW after clipping; by both ways of measuring in turn."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.AdamW(inner.parameters(), 1e-2)
    with gradprobe.attach(model, TASKS, path, every=1, optimizer=optimizer, updates=True) as probe:
        for step in range(STEPS):
            found = losses(model, share(batch(step, torch.float32)))
            if step % 2:
                probe.backward(found, WEIGHTS)
            else:
                probe.record(found, WEIGHTS)
                sum(WEIGHTS[t] * found[t] for t in TASKS).backward()
            nn.utils.clip_grad_norm_(inner.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


SIZES = ([2, 4], [3, 3])
"""Of the micro-batches in each process."""


def in_micro_batches(model, path, sizes, parts, group=None, loader=None):
    """Some steps in micro-batches, this process's among them; ``parts`` says which slices of the batch they are."""
    with gradprobe.attach(model, TASKS, path, every=1, process_group=group, probe_loader=loader) as probe:
        for step in range(STEPS):
            pieces = batch(step, torch.float64).split([size for one in SIZES for size in one])
            micro = [losses(model, pieces[i]) for i in parts]
            probe.backward(weights=WEIGHTS, micro=micro, batch_size=sizes)


def drawn(model):
    """A probe loader on the samples of one batch."""
    data = batch(99, torch.float64)
    return gradprobe.ProbeLoader(data, lambda x: losses(model, x), batch_size=4, batches=2, every=2)


def main(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def mine(x):
        return x.chunk(2)[rank]

    out = {}
    for dtype in (torch.float64, torch.float32):
        for way in WAYS:
            model, sink = DistributedDataParallel(make(dtype)), Collector()
            out[way, dtype] = recorded(model, folder / f"{way}-{dtype}.h5", mine, way, dtype, [sink])
            out["sink", way, dtype] = len(sink.rows)
    updated(DistributedDataParallel(make(torch.float32)), folder / "updates.h5", mine)
    out["bare"] = train(DistributedDataParallel(make(torch.float32)), mine, "backward", torch.float32)
    if find_spec("torchjd"):
        out["surgery"] = operated(DistributedDataParallel(make(torch.float64)), mine, torch.float64)
    model = make(torch.float64)
    places = [2 * rank, 2 * rank + 1]
    in_micro_batches(model, folder / "micro.h5", SIZES[rank], places, dist.group.WORLD, drawn(model))
    out["failing"] = failing(folder, rank, mine)
    out["budget"] = budgeted(rank, mine)
    out["different"] = different(rank)
    out["experts"] = routed(rank, mine)
    for flags in FLAGS:
        for use in ("record", "backward"):
            name, *_ = flags
            out[name, use] = [flagged(flags, use, mine, probed) for probed in (False, True)]
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


def failing(folder, rank, mine):
    """Measuring fails in the second process alone, in the passes and then in the hooks of the joint backward."""
    from gradprobe.probes import passes

    model = DistributedDataParallel(make(torch.float32))
    rows = []
    with warnings.catch_warnings(record=True), gradprobe.attach(model, TASKS, folder / "failing.h5", every=1) as probe:
        for step in range(STEPS):
            real = passes.pass_to, passes.ArrivingGradientsOfProcesses.add
            if rank == 1 and step == 3:
                passes.pass_to = lambda *_: 1 / 0
            if rank == 1 and step == 4:
                passes.ArrivingGradientsOfProcesses.add = lambda *_: 1 / 0
            probe.backward(losses(model, mine(batch(step, torch.float32))), WEIGHTS)
            passes.pass_to, passes.ArrivingGradientsOfProcesses.add = real
            rows.append(probe._recorder.gradients.last_gram.copy())
    return [p.grad.clone() for p in model.parameters()]


def budgeted(rank, mine):
    """The second process is slow, and would measure less often by itself."""
    model, steps = DistributedDataParallel(make(torch.float32)), []
    real = processes.ManyProcesses.mean
    with gradprobe.attach(model, TASKS, budget=0.3) as probe:
        for step in range(60):
            processes.ManyProcesses.mean = lambda self, values, step=step: (steps.append(step), real(self, values))[1]
            time.sleep(0.002 + 0.004 * rank)
            probe.backward(losses(model, mine(batch(step, torch.float32))), WEIGHTS)
    processes.ManyProcesses.mean = real
    return steps


def different(rank):
    """In the second process a task goes another way, and at the next step it is absent there, then everywhere."""
    model, sink = DistributedDataParallel(make(torch.float64), find_unused_parameters=True), Collector()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradprobe.attach(model, TASKS, every=1, sinks=[sink]) as probe:
            for step in range(3):
                found = losses(model, batch(0, torch.float64))
                if step == 0 and rank == 1:
                    found["c"] = model.module.early(torch.ones(1, 16, dtype=torch.float64)).sum()
                if step == 2 or (step == 1 and rank == 1):
                    del found["c"]
                probe.record(found)
    return sink


class Experts(Net):
    """Four experts behind the trunk, of which each process takes its own."""

    def __init__(self):
        super().__init__(torch.float64)
        self.experts = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(4))

    def forward(self, x, expert):
        one = self.norm(self.first(x).tanh())
        two = self.second(one).tanh()
        two = two + self.experts[expert](two).tanh()
        return self.heads[0](two), self.heads[1](two), self.early(one)

    def losses(self, x, expert, forward=None):
        a, b, c = (forward or self)(x, expert)
        return {"a": a.square().mean(), "b": b.cosh().mean(), "c": c.cosh().mean()}


def expert_of(step, rank):
    return (step + rank * (step % 3)) % 4


def routed(rank, mine):
    torch.manual_seed(0)
    model, sink = DistributedDataParallel(Experts(), find_unused_parameters=True), Collector()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradprobe.attach(model, TASKS, every=1, sinks=[sink]) as probe:
            for step in range(STEPS):
                x = mine(batch(step, torch.float64))
                probe.backward(model.module.losses(x, expert_of(step, rank), model))
                model.zero_grad()
    return sink


FLAGS = ({"find_unused_parameters": True}, {"static_graph": True})


def flagged(flags, use, mine, probed):
    """Parameters at the end, and rows, of a training under DDP with such flags."""
    model, sink = DistributedDataParallel(make(torch.float64), **flags), Collector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = gradprobe.attach(model, TASKS, every=1, sinks=[sink]) if probed else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            found = losses(model, mine(batch(step, torch.float64)))
            if probe is not None and use == "backward":
                probe.backward(found, WEIGHTS)
            else:
                if probe is not None:
                    probe.record(found, WEIGHTS)
                sum(WEIGHTS[t] * found[t] for t in TASKS).backward()
            optimizer.step()
            optimizer.zero_grad()
        if probe is not None:
            probe.close()
    return [p.detach().clone() for p in model.parameters()], sink


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
