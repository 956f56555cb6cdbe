"""What test_sharded.py has two processes do: train a model that FSDP2 shards, with probes that must refuse it.

python tests/sharded_ranks.py FOLDER RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from zoo import Collector, Heads, batch

from gradprobe import GradientProbe, doctor
from gradprobe.errors import ProbeError

TASKS = ("a", "b")


def make():
    torch.manual_seed(0)
    return Heads(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16)), 16)


def losses(model, step, rank):
    outputs = model(batch(2 * step + rank, (4, 6), torch.float32))
    return {task: out.square().mean() for task, out in zip(TASKS, outputs, strict=True)}


def shard(model, whole):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.trunk[0], mesh=mesh)
    if whole:
        fully_shard(model, mesh=mesh)
    return model


def trained(rank, whole, by, **options):
    """Four steps; what the probe said, its rows, and the weights at the end."""
    model, sink, said = shard(make(), whole), Collector(), []
    watched = options.pop("of", lambda model: model)(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = GradientProbe(watched, TASKS, [sink], every=1, optimizer=optimizer, **options) if by else None
    for step in range(4):
        found = losses(model, step, rank)
        total = sum(found.values())
        if probe is not None:
            try:
                getattr(probe, by)(found)
            except ProbeError as error:
                said.append(str(error))
            else:
                said.append("measured")
                total = None if by == "backward" else total
        if total is not None:
            total.backward()
        optimizer.step()
        optimizer.zero_grad()
    if probe is not None:
        probe.close()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return said, len(sink.rows), [w.detach().tolist() for w in weights]


def sharded_later(rank):
    """The model is sharded after a row was measured."""
    model, said = make(), []
    with GradientProbe(model, TASKS, every=1) as probe:
        probe.record(losses(model, 0, rank))
        shard(model, True)
        try:
            probe.record(losses(model, 1, rank))
        except ProbeError as error:
            said.append(str(error))
    return said


def main(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {"alone": trained(rank, True, None)}
    for by in ("backward", "record"):
        found[by] = trained(rank, True, by)
        found[f"{by} sketched"] = trained(rank, True, by, sketch=16, memory="low")
        found[f"{by} in part"] = trained(rank, False, by)
        found[f"{by} within"] = trained(rank, True, by, of=lambda model: model.trunk)
    found["later"] = sharded_later(rank)
    model = shard(make(), True)
    found["doctor"] = [finding.check for finding in doctor(model, losses(model, 0, rank))]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
